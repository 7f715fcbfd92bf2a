"""Endless children's stories, so that a model can be trained on a machine without a network.
The plots (`plots.txt`) and the word lists (`words.txt`) were written by hand for this project, and
each file explains its format at the top. `generator.py` draws a plot, fills its slots with words
and chooses among its phrasings. `VERSION` changes whenever the stories do, so it can key caches.
"""

from flashlm_helpers.builtin.generator import VERSION, stories

__all__ = ["VERSION", "stories"]
