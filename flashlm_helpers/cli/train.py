"""flashlm train: train a model to a time limit, or go on training one."""

import argparse
import itertools
import time
from dataclasses import replace
from pathlib import Path

from flashlm_helpers.checkpoint import BEST, LAST, Checkpoint
from flashlm_helpers.cli.common import (
    add_curriculum_flags,
    add_mixer_flag,
    add_recipe_flags,
    add_text_flags,
    choose_preset,
    given_recipe,
    notice,
    parse_curriculum,
    stories_for,
)
from flashlm_helpers.config import PRESETS, FlashLMError, ModelConfig, TrainConfig, find_preset
from flashlm_helpers.corpus import Corpus, Curriculum, check_shares, open_corpus, open_curriculum
from flashlm_helpers.experiments.experiment import Experiment, RunReport
from flashlm_helpers.experiments.size import count_parameters
from flashlm_helpers.generation import generate
from flashlm_helpers.machine.files import atomic_write, hold_folder, project_dir, require_writable
from flashlm_helpers.runtime import load_to_resume

DEFAULT_HOURS = 2.0
RECIPE_FLAGS = ["hours", "epochs", "batch", "lr", "dropout", "seed", "patience"]


def add_parser(commands) -> None:
    """Add the command and its flags; the published script's flags keep their names and meaning."""
    parser = commands.add_parser(
        "train",
        help="train a model to a time limit",
        epilog=f"Without --hours and --epochs it trains for {DEFAULT_HOURS:g} hours. Where --hours "
        "and --epochs are both given, the run ends with the first. Without --batch, a timed run of "
        "two minutes or more measures its batch.",
    )

    # What is trained.
    size = parser.add_mutually_exclusive_group()
    size.add_argument("--small", action="store_true", help="train v4-small (4.4 M parameters)")
    size.add_argument(
        "--large",
        action="store_true",
        help="train v4-large (16.9 M); default: by cores and memory",
    )
    size.add_argument(
        "--preset",
        choices=PRESETS,
        help="train this preset; *-float: its twin with float weights",
    )
    parser.add_argument(
        "--vocab-size",
        type=int,
        help="token ids in the vocabulary (default: as many as the preset has)",
    )
    parser.add_argument(
        "--mixers",
        metavar="NAME,NAME,...",
        help="mixers instead of the preset's, a pattern that repeats over the blocks",
    )
    add_mixer_flag(parser)

    # How, on which text, and where it goes.
    add_recipe_flags(parser, RECIPE_FLAGS)
    parser.add_argument("--eager", action="store_true", help="do not use torch.compile")
    add_text_flags(parser)
    add_curriculum_flags(parser)
    parser.add_argument(
        "--save-dir",
        metavar="PATH",
        help="where the run goes (default: a new folder in checkpoints/)",
    )
    parser.add_argument(
        "--resume",
        metavar="PATH",
        help="a run's folder or its last.pt: go on exactly where it stopped",
    )


def run(args: argparse.Namespace) -> dict:
    """Train, or go on training; print BPC and a story."""
    resume = load_to_resume(args.resume) if args.resume else None
    recipe = choose_recipe(args, resume)
    model = choose_model(args, resume)
    experiment = Experiment(choose_text(args, resume, recipe), model, recipe)
    folder = choose_folder(args, model.name)

    # From here on the folder is this run's alone; resumed is what the run before it left there.
    with hold_folder(folder):
        take_over(folder, args)
        report = train_in(folder, experiment, args)
    if not args.json:
        print(f"{summary(report)}\n\nkept in {folder}\n")

    # The story comes last, when all else is said and saved.
    story = generate(report.model, "Once upon a time", seed=recipe.seed)[0].text
    if not args.json:
        print(story)
    return report.as_dict() | {"story": story, "save_dir": str(folder)}


def train_in(folder: Path, experiment: Experiment, args: argparse.Namespace) -> RunReport:
    """Say what the text gives, then train in `folder`."""
    corpus = experiment.text
    text = experiment.prepare()
    size = len(text.vocabulary)
    if args.vocab_size and size < args.vocab_size:
        raise FlashLMError(
            f"the text supports a vocabulary of {size:,} ids, not {args.vocab_size:,}: "
            f"give --vocab-size {size} or less, or more text"
        )
    notice(
        f"{corpus.name}: {text.train.n_stories:,} stories, {text.train.n_tokens / 1e6:.1f} M "
        f"tokens; vocabulary of {size:,} covers {text.vocabulary.coverage:.2%}; "
        f"training {experiment.model.name} into {folder}"
    )
    return experiment.run(folder, args.resume)


def choose_recipe(args: argparse.Namespace, resume: Checkpoint | None) -> TrainConfig:
    """Return the recipe of a new run, or of a resumed one with what the flags change."""
    given = given_recipe(args, RECIPE_FLAGS)
    if args.eager:
        given["compile"] = False
    if resume is None:
        if "hours" not in given and "epochs" not in given:
            given["hours"] = DEFAULT_HOURS
        return TrainConfig(**given)

    # With another budget, it is decided anew how to compute.
    before = resume.train_config
    recipe = replace(before, **given)
    if (recipe.hours, recipe.epochs) != (before.hours, before.epochs):
        recipe = replace(before, **({"bfloat16": None, "compile": None} | given))
    return recipe


def choose_model(args: argparse.Namespace, resume: Checkpoint | None) -> ModelConfig:
    """Return the architecture: a preset's, with other mixers if asked for, or the resumed one's."""
    preset = args.preset
    if args.large:
        preset = "v4-large"
    elif args.small:
        preset = "v4-small"

    if resume is not None:
        model = resume.network.config
        for flag, value in {"--vocab-size": args.vocab_size, "--mixers": args.mixers}.items():
            if value is not None:
                raise FlashLMError(f"{flag} is for a new run: a resumed one keeps its architecture")
        if preset and preset != model.name:
            raise FlashLMError(
                f"{args.resume} holds a {model.name}: leave out the preset to resume"
            )
        return model

    model = find_preset(preset or choose_preset())
    if args.mixers is not None:
        model = replace(model, mixers=tuple(args.mixers.split(",")))
    if args.vocab_size is not None:
        model = replace(model, vocabulary_size=args.vocab_size)
    count_parameters(model)  # refuses unknown mixers before the text is read
    return model


def choose_text(args: argparse.Namespace, resume: Checkpoint | None, recipe: TrainConfig) -> Corpus:
    """Open the text that the flags name, or that the resumed run was trained on."""
    if args.shuffled and not args.curriculum:
        raise FlashLMError("--shuffled needs several texts: name them with --curriculum")
    if args.curriculum:
        return choose_curriculum(args, recipe)

    # A resumed run goes on with as much of its text, wherever that is now.
    source = resume.source if resume else None
    grade = args.max_grade
    if grade is None and source:
        grade = source.max_grade
    if args.text_dir:
        return open_corpus(Path(args.text_dir), source.limit if source else None, grade)

    # A data set of the hub is read no further than the run can get.
    if args.dataset:
        limit = source.limit if source else stories_for(recipe.hours)
        return open_corpus(args.dataset, limit, grade)
    if resume is None:
        return open_corpus("auto", stories_for(recipe.hours), grade)

    if source is None:
        raise FlashLMError(
            f"{args.resume} does not say which text it was trained on: resume from the {LAST} of "
            "a run that was started here, or name its text"
        )
    for part in source.stages or [source]:
        if part.text_dir and not Path(part.text_dir).is_dir():
            problem = f"the text of this run is no longer in {part.text_dir}"
            flag = "--curriculum" if source.stages else "--text-dir DIR"
            raise FlashLMError(f"{problem}: say where it is now with {flag}")
    return open_corpus(source)


def choose_curriculum(args: argparse.Namespace, recipe: TrainConfig) -> Curriculum:
    """Open the texts of --curriculum."""
    if args.text_dir or args.dataset:
        raise FlashLMError("--curriculum names all texts: leave out --text-dir and --dataset")
    named = parse_curriculum(args.curriculum)
    check_shares([share for _, share in named])
    stages = []
    for name, share in named:
        # A folder is read whole, a data set of the hub no further than its stage can get.
        folder = Path(name).is_dir()
        limit = None
        if recipe.hours is not None and not folder:
            limit = stories_for(recipe.hours * share)
        text = Path(name) if folder else name
        stages.append((open_corpus(text, limit, args.max_grade), share))
    return open_curriculum(stages, args.shuffled)


def choose_folder(args: argparse.Namespace, preset: str) -> Path:
    """Return where the run goes: the folder asked for, or a new one with a name of its own."""
    if args.save_dir:
        return Path(args.save_dir)
    if args.resume:
        return resumed_folder(args)

    # Two runs may start in one second.
    checkpoints = project_dir() / "checkpoints"
    require_writable(checkpoints)
    stamp = f"{preset}-{time.strftime('%Y%m%d-%H%M%S')}"
    name = stamp
    for number in itertools.count(2):
        folder = checkpoints / name
        try:
            folder.mkdir()
            return folder
        except FileExistsError:
            name = f"{stamp}-{number}"


def resumed_folder(args: argparse.Namespace) -> Path:
    """Return the folder of the run that --resume names."""
    resumed = Path(args.resume)
    return resumed if resumed.is_dir() else resumed.parent


def take_over(folder: Path, args: argparse.Namespace) -> None:
    """Refuse a folder of another run; a resumed run that moves takes its best weights along."""
    resumed = resumed_folder(args) if args.resume else None
    if resumed and folder.resolve() == resumed.resolve():
        return
    if (folder / LAST).exists():
        raise FlashLMError(
            f"{folder} holds a run already: go on with --resume {folder}, or choose another "
            "--save-dir"
        )
    if resumed and (resumed / BEST).is_file():
        with atomic_write(folder / BEST) as file:
            file.write((resumed / BEST).read_bytes())


def summary(report: RunReport) -> str:
    """Say in two lines what came out of a run."""
    return (
        f"stopped by {report.stopped_by} after {report.seconds:.0f} s and "
        f"{report.tokens_seen:,} tokens ({report.tokens_per_second:,.0f} tokens/s)\n"
        f"validation: {report.val_nats_per_token:.4f} nats/token, BPC {report.bpc:.4f}, "
        f"BPB {report.bpb:.4f}"
    )
