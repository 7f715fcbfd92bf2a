/* Runs packed FlashLM models. One file, C11 with the vectors of GCC and Clang, no library but the C library itself:
 *
 *     cc -O3 bolt.c -o bolt && ./bolt model.flashlm "Once upon a time"
 *
 * (GCC notes that passing vectors has changed; here they are passed between inlined functions only.)
 *
 * The ternary layers make no multiplication by a weight. Three weights have 27 possible values, so for every three inputs
 * there are 27 possible sums; they are made once by additions and subtractions, and then each row of the matrix looks its
 * own up and adds it. One scale a layer is multiplied in at the end. packed.py describes the file.
 *
 * A state writes one text, or 16 side by side. What a text keeps of n channels are n floats, of 16 texts n times 16: the
 * same loops take 16 floats at a time, which are 16 channels of one text or one channel of 16 texts.
 */
#define _POSIX_C_SOURCE 200809L
#include <errno.h>
#include <fcntl.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <unistd.h>
#if defined(__x86_64__)
#include <immintrin.h>
#endif
#pragma GCC diagnostic ignored "-Wpsabi"

enum {
    PAD, UNK, BOS, EOS, SPECIALS,
    VERSION = 1, HEADER = 192, ALIGNMENT = 64, BYTES = 256, MERGES = 50000, CLASSES = 3,
    LANES = 16,             /* rows of a tile, and texts side by side: the floats of a register of AVX-512 */
    TILES = 4,              /* tiles come in fours, the last rows of which may be none of the matrix */
    TABLE = 32,             /* room of a table of sums, of which 27 are used */
    NEGATIVE = 16,          /* where those begin that have their signs turned */
    TOGETHER = 16,          /* tables made at once for 16 texts: they fit the fastest cache */
    LONGEST_TOKEN = 1024,   /* bytes; GPT-2's own longest has 128 */
};
#define LARGEST_FILE (1u << 30)  /* bytes */
#define LARGEST_STATE (1u << 26) /* floats, of one text */
#define NONE 0xFFFFFFFFu
#define LOWEST (-__builtin_inff())

typedef float vec __attribute__((vector_size(4 * LANES)));
typedef float vec8 __attribute__((vector_size(4 * LANES / 2)));
typedef float vec4 __attribute__((vector_size(4 * LANES / 4)));
typedef int32_t ivec __attribute__((vector_size(4 * LANES)));
typedef int8_t bytes __attribute__((vector_size(LANES)));

typedef struct {
    int rows, cols, groups, tiles;
    float scale[2];     /* of the first and of the second half of the rows: they may come from two layers */
    uint8_t *codes;     /* (tiles, groups, LANES): three weights each, see DEFINE_TABLES */
} ternary;

typedef struct {
    int attention;
    const float *mixer_norm, *glu_norm, *layer_scale, *taps;
    ternary in, out, gate_up, down;
    size_t state;       /* where its part of a state starts, for one text */
} block;

typedef struct kernels kernels;

typedef struct { float p; int id; } candidate;

typedef struct {
    int tokens;             /* the most to write */
    float temperature;      /* 0: greedy */
    int top_k;              /* 0: all */
    float top_p;            /* 1: all */
    uint64_t seed;
    const volatile int *stop;  /* may be NULL; all writing ends when another thread makes it something else than 0 */
} bolt_settings;

typedef struct {
    const uint8_t *file;
    size_t size, state_floats;
    int width, blocks, hidden, kernel, vocabulary, heads, window, bits;
    int row, slots;                     /* vocabulary and window, rounded up to LANES */
    block *block;
    const float *norm, *embedding32;    /* embedding: in tiles of LANES ids, (row / LANES, width, LANES), */
    const int8_t *embedding8;           /* at 8 bits (row / LANES, width / 4, LANES, 4) */
    float *scales;                      /* of the embedding's rows */
    const kernels *run;
    const uint16_t *kept, *merges;      /* GPT-2's ids of ours; what its ids from 256 on are merged from */
    uint64_t *pairs;                    /* the merges as left, right, number: sorted, to be found by what they merge */
    uint16_t *direct, *length, *next;   /* ours of GPT-2's ids (0: none), their bytes, our next id with the same first byte */
    uint16_t first[BYTES];              /* our ids by first byte */
    uint8_t byte_of[BYTES], id_of[BYTES];
    uint32_t *classes[CLASSES];         /* letters, digits, white space: first and last code point of each range */
    int ranges[CLASSES];
} bolt_model;

typedef struct {
    const bolt_model *model;
    int texts;          /* 1 or LANES */
    long position, start[LANES];  /* of all texts, and where each began */
    float *memory, *scratch;
} bolt_state;

static int fail(char *error, size_t room, const char *format, ...) {  /* one line, whatever is in a file's name */
    va_list arguments;
    va_start(arguments, format);
    vsnprintf(error, room, format, arguments);
    va_end(arguments);
    for (; *error; error++)
        if ((unsigned char)*error < ' ') *error = ' ';
    return -1;
}

static size_t rounded(size_t number, size_t step) { return (number + step - 1) / step * step; }

/* ---- arithmetic, without a mathematical library ---- */

#define INLINE static inline __attribute__((always_inline))
#define APART __attribute__((noinline))  /* a function of its own, so that its machine code can be looked at */
#define SPLAT(x) ((x) - (vec){0})

INLINE vec load(const float *p) {
    vec v;
    memcpy(&v, p, sizeof v);
    return v;
}

INLINE void store(float *p, vec v) { memcpy(p, &v, sizeof v); }

INLINE vec choose_lanes(ivec mask, vec yes, vec no) { return (vec)((mask & (ivec)yes) | (~mask & (ivec)no)); }

INLINE float sum_of(vec v) {
    float total = 0;
    for (int lane = 0; lane < LANES; lane++) total += v[lane];
    return total;
}

INLINE vec exponential(vec x) {
    x = choose_lanes(x > SPLAT(-87.0f), x, SPLAT(-87.0f));  /* also what is no number */
    x = choose_lanes(x < SPLAT(88.0f), x, SPLAT(88.0f));
    vec n = (x * 1.44269504f + 12582912.0f) - 12582912.0f;  /* rounded: beyond 1.5 * 2^23 there are no fractions */
    vec r = x - n * 0.693359375f + n * 2.12194440e-4f, p = r * 1.9875691500e-4f + 1.3981999507e-3f;
    p = p * r + 8.3334519073e-3f;
    p = p * r + 4.1665795894e-2f;
    p = p * r + 1.6666665459e-1f;
    p = p * r + 5.0000001201e-1f;
    p = p * r * r + r + 1.0f;
    return p * (vec)((__builtin_convertvector(n, ivec) + 127) << 23);
}

INLINE vec inverse_root(vec x) {  /* of positive, normal numbers */
    vec y = (vec)(0x5F3759DF - ((ivec)x >> 1));
    for (int n = 0; n < 4; n++) y *= 1.5f - 0.5f * x * y * y;
    return y;
}

static double logarithm(double x) {  /* of a positive, normal number */
    union { double value; uint64_t bits; } u = {.value = x};
    int exponent = (int)(u.bits >> 52) - 1023;
    u.bits = (u.bits & 0xFFFFFFFFFFFFFull) | 0x3FF0000000000000ull;
    double t = (u.value - 1) / (u.value + 1), sum = 0;
    for (int k = 27; k > 0; k -= 2) sum = sum * t * t + 1.0 / k;
    return 2 * t * sum + exponent * 0.69314718055994530942;
}

/* ---- one token of S texts: these loops are compiled once for each kind of processor, see INSTANCE below ---- */

/* Of a parameter for each channel, what floats i to i + 15 of a text's or 16 texts' channels take. */
INLINE vec per_channel(const float *p, int i, const int S) { return S == 1 ? load(p + i) : SPLAT(p[i / LANES]); }

/* Of a number that each text has, the n-th. */
INLINE vec per_text(const float *p, int n, const int S) { return S == 1 ? SPLAT(p[n]) : load(p + n * LANES); }

/* The 27 sums of every three inputs, each chosen with -1, 0 or 1; by additions and subtractions only. Half of them are the
 * other half with their signs turned: entry k, of 1 to 13, is k written with digits of -1, 0 and 1, and entry 16 + k is -k. */
#define DEFINE_TABLES(NAME, NUMBER)                                                                                    \
    INLINE void NAME(const NUMBER *x, int count, NUMBER *tables) {                                                     \
        const NUMBER zero = {0};                                                                                       \
        for (int i = 0; i < count; i += 3, tables += TABLE) {                                                          \
            NUMBER a = x[i], b = i + 1 < count ? x[i + 1] : zero, c = i + 2 < count ? x[i + 2] : zero;                 \
            NUMBER sums[14] = {zero, a, b - a, b, b + a};                                                              \
            for (int k = 5; k <= 13; k++) sums[k] = k < 9 ? c - sums[9 - k] : c + sums[k - 9];                         \
            for (int k = 0; k < 14; k++) tables[k] = sums[k], tables[k + NEGATIVE] = zero - sums[k];                   \
        }                                                                                                              \
    }
DEFINE_TABLES(make_tables, float)
DEFINE_TABLES(make_wide_tables, vec)

/* For one text: y[row] = the sum of what its groups of three look up. */
typedef void look_up(const ternary *layer, const float *tables, float *y);

INLINE void look_up_body(const ternary *layer, const float *tables, float *y) {
    const uint8_t *code = layer->codes;
    for (int tile = 0; tile < layer->tiles; tile++, y += LANES) {
        float sum[LANES] = {0};
        const float *table = tables;
        for (int group = 0; group < layer->groups; group++, code += LANES, table += TABLE)
            for (int lane = 0; lane < LANES; lane++) sum[lane] += table[code[lane]];
        memcpy(y, sum, sizeof sum);
    }
}

/* For 16 texts: to y[row] (16), or to nothing at first, is added what `count` groups look up. With vectors of a size that the
 * processor has. */
typedef void look_up_16(const ternary *layer, int from, int count, const float *tables, float *y);

#define DEFINE_LOOK_UP_16(NAME, TARGET, VECTOR, ROWS)                                                                  \
    TARGET APART static void look_up_16_##NAME(const ternary *layer, int from, int count, const float *tables, float *y) { \
        enum { PARTS = sizeof(vec) / sizeof(VECTOR) };                                                                 \
        const VECTOR *end = (const VECTOR *)tables + count * TABLE * PARTS;                                            \
        for (int row = 0; row < layer->tiles * LANES; row += ROWS)                                                     \
            for (int part = 0; part < PARTS; part++) {                                                                 \
                const uint8_t *code = layer->codes + ((size_t)(row / LANES) * layer->groups + from) * LANES + row % LANES; \
                VECTOR sum[ROWS], *rows = (VECTOR *)y + row * PARTS + part;                                            \
                for (int r = 0; r < ROWS; r++) sum[r] = from ? rows[r * PARTS] : (VECTOR){0};                          \
                for (const VECTOR *table = (const VECTOR *)tables + part; table < end; table += TABLE * PARTS, code += LANES) \
                    for (int r = 0; r < ROWS; r += 8) {  /* one load for eight codes: loading is what takes the time */ \
                        uint64_t codes;                                                                                \
                        memcpy(&codes, code + r, 8);                                                                   \
                        for (int k = 0; k < 8; k++, codes >>= 8) sum[r + k] += table[(codes & 255) * PARTS];           \
                    }                                                                                                  \
                for (int r = 0; r < ROWS; r++) rows[r * PARTS] = sum[r];                                               \
            }                                                                                                          \
    }

INLINE void apply(const ternary *layer, const float *x, float *tables, float *y, look_up *one, look_up_16 *many, const int S) {
    if (S == 1) {
        make_tables(x, layer->cols, tables);
        one(layer, tables, y);
    } else {
        for (int from = 0; from < layer->groups; from += TOGETHER) {
            int left = layer->cols - 3 * from, count = (left + 2) / 3 < TOGETHER ? (left + 2) / 3 : TOGETHER;
            make_wide_tables((const vec *)x + 3 * from, left < 3 * count ? left : 3 * count, (vec *)tables);
            many(layer, from, count, tables, y);
        }
    }
    for (int i = 0; i < layer->rows * S; i += LANES)
        store(y + i, load(y + i) * layer->scale[i >= layer->rows / 2 * S]);
}

INLINE void rms_norm(const float *x, const float *weight, int count, float eps, float *out, const int S) {
    vec squares = {0};
    for (int i = 0; i < count * S; i += LANES) squares += load(x + i) * load(x + i);
    if (S == 1) squares = SPLAT(sum_of(squares));
    vec factor = inverse_root(squares / (float)count + eps);
    for (int i = 0; i < count * S; i += LANES)
        store(out + i, weight ? load(x + i) * factor * per_channel(weight, i, S) : load(x + i) * factor);
}

/* out = x * sigmoid(gate) */
INLINE void multiply_by_sigmoid(const float *x, const float *gate, int count, float *out) {
    for (int i = 0; i < count; i += LANES) store(out + i, load(x + i) / (1.0f + exponential(-load(gate + i))));
}

/* mixed = value and the K-1 values before it, weighed by the taps; `past` is a ring of those. */
INLINE void convolve(const float *taps, int kernel, int channels, long position, float *past, const float *value,
                     float *mixed, const int S) {
    const float *tap = taps + (size_t)(kernel - 1) * channels;
    int count = channels * S;
    for (int i = 0; i < count; i += LANES) store(mixed + i, load(value + i) * per_channel(tap, i, S));
    for (int back = 1; back < kernel; back++) {
        const float *row = past + (size_t)((position + kernel - 1 - back) % (kernel - 1)) * count;
        tap -= channels;
        for (int i = 0; i < count; i += LANES)
            store(mixed + i, load(mixed + i) + load(row + i) * per_channel(tap, i, S));
    }
    if (kernel > 1) memcpy(past + (size_t)(position % (kernel - 1)) * count, value, 4 * (size_t)count);
}

/* Query, key and value (3D) to what the heads attend to (D) over the last `window` tokens. Keys are kept as (D, slots),
 * values as (slots, D). No largest score is subtracted: normalized queries and keys cannot have large ones. */
INLINE void attend(const bolt_model *m, float *qkv, const bolt_state *state, float *keys, float *chances, float *out,
                   const int S) {
    int D = m->width, d = D / m->heads, window = m->window, slot = (int)(state->position % window);
    int used = state->position < window ? (int)state->position + 1 : window;
    float *values = keys + (size_t)D * m->slots * S, *distance = chances + m->slots * S, age[LANES];
    for (int r = 0; r < m->slots; r++) distance[r] = r < window ? (float)(slot - r + (r > slot ? window : 0)) : 1e30f;
    for (int t = 0; t < LANES; t++) age[t] = (float)(state->position - state->start[S == 1 ? 0 : t]);
    for (int h = 0; h < 2 * m->heads; h++) rms_norm(qkv + h * d * S, NULL, d, 1.1920929e-7f, qkv + h * d * S, S);
    for (int i = 0; i < D * S; i++) keys[((size_t)(i / S) * m->slots + slot) * S + i % S] = qkv[D * S + i];
    memcpy(values + (size_t)slot * D * S, qkv + 2 * D * S, 4 * (size_t)(D * S));
    float shrink = inverse_root(SPLAT((float)d))[0];
    for (int h = 0; h < m->heads; h++) {
        float slope = exponential(SPLAT(-0.69314718f * (m->heads > 1 ? 1 + 7.0f * h / (m->heads - 1) : 1)))[0];
        vec total = {0};
        for (int i = 0; i < used * S; i += LANES) {
            vec score = {0};
            for (int k = h * d; k < (h + 1) * d; k++)
                score += load(keys + (size_t)k * m->slots * S + i) * per_text(qkv, k, S);
            vec far = per_channel(distance, i, S), chance = exponential(score * shrink - far * slope);
            chance = choose_lanes(far <= load(age), chance, (vec){0});  /* not of what was before the text */
            store(chances + i, chance);
            total += chance;
        }
        if (S == 1) total = SPLAT(sum_of(total));
        for (int i = h * d * S; i < (h + 1) * d * S; i += LANES) {
            vec sum = {0};
            for (int r = 0; r < used; r++) sum += load(values + (size_t)r * D * S + i) * per_text(chances, r, S);
            store(out + i, sum / total);
        }
    }
}

INLINE void add(float *x, const float *y, const float *layer_scale, int count, const int S) {
    for (int i = 0; i < count * S; i += LANES)
        store(x + i, load(x + i) + (layer_scale ? load(y + i) * per_channel(layer_scale, i, S) : load(y + i)));
}

/* The logits of each text, one row after another, from an embedding of floats. */
INLINE void head32(const bolt_model *m, const float *x, float *logits, const int S) {
    for (int v = 0; v < m->row; v += LANES) {
        const float *weights = m->embedding32 + (size_t)v * m->width;
        vec sum[LANES] = {{0}};  /* of each text; or of a part of one text, as each addition waits for the one before it */
        for (int d = 0; d < m->width; d += 8)
            for (int k = 0; k < 8; k++)
                for (int s = 0; s < S; s++)
                    sum[S == 1 ? k : s] += load(weights + (d + k) * LANES) * x[(d + k) * S + s];
        for (int k = 1; k < 8 && S == 1; k++) sum[0] += sum[k];
        for (int s = 0; s < S; s++) store(logits + (size_t)s * m->row + v, sum[s]);
    }
}

typedef void add_products(ivec *sums, const int8_t *four, int odd, int32_t pair);

/* From an embedding of 8 bits: the inputs get 16 or, if their sums did not fit 32 bits, fewer; the rest is exact. Pairs are
 * of every second input, as they are found in the integers that hold the weights of four. */
INLINE void head8(const bolt_model *m, const float *x, float *logits, int32_t *pairs, add_products *add, const int S) {
    const int D = m->width;
    const float limit = D > 512 ? (float)(0x7FFFFFFF / 128 / D) : 32767;
    float unit[LANES];
    for (int s = 0; s < S; s++) {
        float top = 1e-30f;
        for (int i = s; i < D * S; i += S) top = x[i] > top ? x[i] : -x[i] > top ? -x[i] : top;
        unit[s] = top / limit;
        for (int d = 0; d < D; d++) {
            float y = x[d * S + s] * (limit / top);
            y = y < limit ? y > -limit ? y : -limit : limit;  /* whatever a damaged model gives */
            int16_t whole = (int16_t)(y + (y < 0 ? -0.5f : 0.5f));
            memcpy((char *)(pairs + (d / 4 * 2 + d % 2) * S + s) + d % 4 / 2 * 2, &whole, 2);
        }
    }
    for (int v = 0; v < m->row; v += LANES) {
        ivec sum[LANES] = {{0}};
        for (int n = 0; n < D / 2; n += S == 1 ? 4 : 1)
            for (int k = 0; k < (S == 1 ? 4 : 1); k++) {
                const int8_t *four = m->embedding8 + (size_t)v * D + (n + k) / 2 * 4 * LANES;
                for (int s = 0; s < S; s++) add(&sum[S == 1 ? k : s], four, (n + k) % 2, pairs[(n + k) * S + s]);
            }
        for (int k = 1; k < 4 && S == 1; k++) sum[0] += sum[k];
        for (int s = 0; s < S; s++)
            store(logits + (size_t)s * m->row + v, __builtin_convertvector(sum[s], vec) * (load(m->scales + v) * unit[s]));
    }
}

/* Floats of a state's scratch: x, normed, y, mixed, chances with distances, tables. */
static size_t scratch_floats(const bolt_model *m, size_t S, size_t part[6]) {
    size_t D = m->width, H = m->hidden, most = H > D ? H : D;
    size_t tables = S == 1 ? (most + 2) / 3 * TABLE : TOGETHER * TABLE * LANES, total = 0;
    size_t sizes[6] = {D * S, most * S, rounded(2 * H > 4 * D ? 2 * H : 4 * D, TILES * LANES) * S, 3 * D * S, m->slots * (S + 1), tables};
    for (int n = 0; n < 6; total += sizes[n++]) part[n] = total;
    return total;
}

INLINE void step_body(bolt_state *s, const uint16_t *ids, float *logits, look_up *one,
                      look_up_16 *many, add_products *add_pairs, const int S) {
    const bolt_model *m = s->model;
    int D = m->width, H = m->hidden;
    size_t part[6];
    scratch_floats(m, S, part);
    float *x = s->scratch, *normed = x + part[1], *y = x + part[2], *mixed = x + part[3], *chances = x + part[4];
    float *tables = x + part[5];
    for (int t = 0; t < S; t++)
        for (int d = 0; d < D; d++) {
            size_t tile = (size_t)(ids[t] / LANES) * D * LANES, lane = ids[t] % LANES;
            x[d * S + t] = m->bits == 32 ? m->embedding32[tile + d * LANES + lane]
                                         : m->embedding8[tile + d / 4 * 4 * LANES + 4 * lane + d % 4] * m->scales[ids[t]];
        }
    for (int n = 0; n < m->blocks; n++) {
        const block *b = &m->block[n];
        float *past = s->memory + b->state * S;
        rms_norm(x, b->mixer_norm, D, 1e-6f, normed, S);
        apply(&b->in, normed, tables, y, one, many, S);
        if (b->attention) {
            convolve(b->taps, m->kernel, 3 * D, s->position, past, y, mixed, S);
            attend(m, mixed, s, past + (size_t)(m->kernel - 1) * 3 * D * S, chances, normed, S);
            multiply_by_sigmoid(normed, y + 3 * D * S, D * S, normed);
        } else {
            convolve(b->taps, m->kernel, D, s->position, past, y + D * S, normed, S);
            multiply_by_sigmoid(normed, y, D * S, normed);
        }
        apply(&b->out, normed, tables, y, one, many, S);
        add(x, y, b->layer_scale, D, S);

        rms_norm(x, b->glu_norm, D, 1e-6f, normed, S);
        apply(&b->gate_up, normed, tables, y, one, many, S);
        multiply_by_sigmoid(y, y, H * S, normed);
        for (int i = 0; i < H * S; i += LANES) store(normed + i, load(normed + i) * load(y + H * S + i));
        apply(&b->down, normed, tables, y, one, many, S);
        add(x, y, b->layer_scale ? b->layer_scale + D : NULL, D, S);
    }
    s->position++;
    if (!logits) return;
    rms_norm(x, m->norm, D, 1e-6f, normed, S);
    if (m->bits == 8) head8(m, normed, logits, (int32_t *)y, add_pairs, S);
    else head32(m, normed, logits, S);
    for (int t = 0; t < S; t++)
        for (int v = m->vocabulary; v < m->row; v++) logits[(size_t)t * m->row + v] = LOWEST;
}

/* ---- one row of logits ---- */

INLINE float largest(const float *x, int count) {
    vec tops[4] = {load(x), load(x), load(x), load(x)};  /* several, because each comparison waits for the one before it */
    for (int i = 0; i < count; i += 4 * LANES)
        for (int k = 0; k < 4; k++) {
            vec v = load(x + (i + k * LANES < count ? i + k * LANES : count - LANES));
            tops[k] = choose_lanes(v > tops[k], v, tops[k]);
        }
    float top = x[0];
    for (int n = 0; n < 4 * LANES; n++) top = tops[n / LANES][n % LANES] > top ? tops[n / LANES][n % LANES] : top;
    return top;
}

/* The sum of exp((x - top) * factor); `powers` (may be NULL): of what. */
INLINE float sum_powers(const float *x, int count, float top, float factor, float *powers) {
    vec sum = {0};
    for (int i = 0; i < count; i += LANES) {
        vec power = exponential((load(x + i) - top) * factor);
        if (powers) store(powers + i, power);
        sum += power;
    }
    return sum_of(sum);
}

/* -ln p of an id. */
INLINE float nats_body(const bolt_model *m, const float *logits, float top, int id) {
    return (float)(logarithm(sum_powers(logits, m->row, top, 1, NULL)) - (logits[id] - top));
}

static double draw(uint64_t *seed) {  /* splitmix64, from 0 to below 1 */
    uint64_t z = *seed += 0x9E3779B97F4A7C15ull;
    z = (z ^ z >> 30) * 0xBF58476D1CE4E5B9ull;
    z = (z ^ z >> 27) * 0x94D049BB133111EBull;
    return (double)((z ^ z >> 31) >> 11) / 9007199254740992.0;
}

static float mass_of(const candidate *all, int count) {
    float mass = 0;
    for (int n = 0; n < count; n++) mass += all[n].p;
    return mass;
}

static void swap(candidate *a, candidate *b) {
    candidate c = *a;
    *a = *b, *b = c;
}

/* Move to the front the fewest of the likeliest whose chances reach `mass`, or `number` of them; returns how many. */
static int keep_likeliest(candidate *all, int count, int number, float mass) {
    int from = 0, to = count;
    float kept = 0;
    while (from < to && from < number && kept < mass) {
        float pivot = all[from + (to - from) / 2].p, above = 0;
        int greater = from, equal;
        for (int n = from; n < to; n++)
            if (all[n].p > pivot) above += all[n].p, swap(&all[n], &all[greater++]);
        if (greater > number || kept + above >= mass) {
            to = greater;  /* enough without the pivot */
            continue;
        }
        from = equal = greater, kept += above;
        for (int n = from; n < to; n++)
            if (all[n].p == pivot) swap(&all[n], &all[equal++]);
        while (from < equal && from < number && kept < mass) kept += all[from++].p;
    }
    return from < to ? from : to;
}

/* The ids from EOS to the last one whose powers are at least `floor`; returns how many. */
INLINE int collect(const float *powers, int vocabulary, float floor, candidate *found) {
    int number = 0;
    for (int i = 0; i < vocabulary; i += LANES) {
        bytes any = __builtin_convertvector(load(powers + i) >= floor, bytes);
        uint64_t halves[2];
        memcpy(halves, &any, sizeof halves);
        if (!(halves[0] | halves[1])) continue;
        for (int v = i; v < i + LANES; v++) {
            found[number] = (candidate){powers[v], v};
            number += powers[v] >= floor && v >= EOS && v < vocabulary;
        }
    }
    return number;
}

/* Choose an id: by temperature, then top-k, then top-p; nats: -ln p of it, before all these. powers, found: room for a row
 * of logits, and of candidates one more. */
INLINE int choose_body(const bolt_model *m, float *logits, const bolt_settings *how, uint64_t *seed, float *powers,
                       candidate *found, float *nats) {
    logits[PAD] = logits[UNK] = logits[BOS] = LOWEST;  /* never written */
    int V = m->vocabulary, best = EOS, count = 0, limit = how->top_k > 0 && how->top_k < V ? how->top_k : V;
    float top = largest(logits, m->row);
    if (how->temperature < 1e-6f) {
        while (best < V - 1 && logits[best] != top) best++;
        *nats = nats_body(m, logits, top, best);
        return best;
    }
    float total = sum_powers(logits, m->row, top, 1 / how->temperature, powers);
    int all = limit == V && how->top_p >= 1;
    for (float floor = all ? 1e-12f : 1e-3f; floor > 1e-36f; floor *= 1e-3f) {  /* no more of the unlikely than needed */
        count = collect(powers, V, floor, found);
        if (all) break;
        if (count >= limit || (limit == V && mass_of(found, count) >= how->top_p * total)) break;
    }
    if (limit < V) {
        count = keep_likeliest(found, count, limit, 3e38f);
        total = mass_of(found, count);
    }
    if (how->top_p < 1) count = keep_likeliest(found, count, V, how->top_p * total > 0 ? how->top_p * total : 1e-30f);
    double point = draw(seed) * mass_of(found, count);
    for (int n = 0; n < count; n++) {
        best = found[n].id;
        if ((point -= found[n].p) < 0) break;
    }
    *nats = nats_body(m, logits, top, best);
    return best;
}

struct kernels {
    const char *name;
    void (*step)(bolt_state *, const uint16_t *, float *);
    int (*choose)(const bolt_model *, float *, const bolt_settings *, uint64_t *, float *, candidate *, float *);
    float (*nats)(const bolt_model *, const float *, int);
};

#define INSTANCE(NAME, TARGET)                                                                                         \
    TARGET static void step_##NAME(bolt_state *s, const uint16_t *ids, float *logits) {                                \
        if (s->texts == 1) step_body(s, ids, logits, look_up_##NAME, NULL, add_products_##NAME, 1);                    \
        else step_body(s, ids, logits, NULL, look_up_16_##NAME, add_products_##NAME, LANES);                           \
    }                                                                                                                  \
    TARGET static int choose_##NAME(const bolt_model *m, float *logits, const bolt_settings *how, uint64_t *seed,      \
                                    float *powers, candidate *found, float *nats) {                                    \
        return choose_body(m, logits, how, seed, powers, found, nats);                                                 \
    }                                                                                                                  \
    TARGET static float nats_##NAME(const bolt_model *m, const float *logits, int id) {                                \
        return nats_body(m, logits, largest(logits, m->row), id);                                                      \
    }                                                                                                                  \
    static const kernels NAME = {#NAME, step_##NAME, choose_##NAME, nats_##NAME};

APART static void look_up_portable(const ternary *layer, const float *tables, float *y) { look_up_body(layer, tables, y); }
static inline void add_products_portable(ivec *sums, const int8_t *four, int odd, int32_t pair) {
    ivec weights;
    memcpy(&weights, four, sizeof weights);
    *sums += (weights << (24 - 8 * odd) >> 24) * (int16_t)pair + (weights << (8 - 8 * odd) >> 24) * (pair >> 16);
}

DEFINE_LOOK_UP_16(portable, , vec4, 8)
INSTANCE(portable, )

#if defined(__x86_64__)
#define AVX2 __attribute__((target("avx2,fma")))
#define AVX512 __attribute__((target("avx512f,avx512bw,avx512dq,avx512vl,fma")))

/* The positive sums fit two registers: bit 3 of a code chooses which, and bit 4 turns the sign. */
AVX2 APART static void look_up_avx2(const ternary *layer, const float *tables, float *y) {
    const size_t next = (size_t)layer->groups * LANES;
    const __m256 sign = _mm256_set1_ps(-0.0f);
    for (int tile = 0; tile < layer->tiles; tile += 2, y += 2 * LANES) {
        const uint8_t *code = layer->codes + tile * next;
        __m256 sum[4];
        for (int k = 0; k < 4; k++) sum[k] = _mm256_setzero_ps();
        for (const float *table = tables; table < tables + layer->groups * TABLE; table += TABLE, code += LANES) {
            __m256 low = _mm256_loadu_ps(table), high = _mm256_loadu_ps(table + 8);
            for (int k = 0; k < 4; k++) {
                __m256i codes = _mm256_cvtepu8_epi32(_mm_loadl_epi64((const __m128i *)(code + k / 2 * next + k % 2 * 8)));
                __m256 found = _mm256_blendv_ps(_mm256_permutevar8x32_ps(low, codes), _mm256_permutevar8x32_ps(high, codes),
                                                _mm256_castsi256_ps(_mm256_slli_epi32(codes, 28)));
                __m256 turned = _mm256_and_ps(_mm256_castsi256_ps(_mm256_slli_epi32(codes, 27)), sign);
                sum[k] = _mm256_add_ps(sum[k], _mm256_xor_ps(found, turned));
            }
        }
        for (int k = 0; k < 4; k++) _mm256_storeu_ps(y + 8 * k, sum[k]);
    }
}

AVX2 static inline void add_products_avx2(ivec *sums, const int8_t *four, int odd, int32_t pair) {
    for (int half = 0; half < 2; half++) {
        __m256i *sum = (__m256i *)sums + half, weights = _mm256_loadu_si256((const __m256i *)four + half);
        weights = _mm256_srai_epi16(odd ? weights : _mm256_slli_epi16(weights, 8), 8);
        *sum = _mm256_add_epi32(*sum, _mm256_madd_epi16(weights, _mm256_set1_epi32(pair)));
    }
}

DEFINE_LOOK_UP_16(avx2, AVX2, vec8, 8)
INSTANCE(avx2, AVX2)

/* A table fits two registers, and one instruction looks 16 rows up. Four tiles at a time hide the latency of adding. */
AVX512 APART static void look_up_avx512(const ternary *layer, const float *tables, float *y) {
    const size_t next = (size_t)layer->groups * LANES;
    for (int tile = 0; tile < layer->tiles; tile += TILES, y += TILES * LANES) {
        const uint8_t *code = layer->codes + tile * next;
        __m512 sum[TILES];
        for (int k = 0; k < TILES; k++) sum[k] = _mm512_setzero_ps();
        for (const float *table = tables; table < tables + layer->groups * TABLE; table += TABLE, code += LANES) {
            __m512 low = _mm512_loadu_ps(table), high = _mm512_loadu_ps(table + LANES);
            for (int k = 0; k < TILES; k++) {
                __m512i codes = _mm512_cvtepu8_epi32(_mm_loadu_si128((const __m128i *)(code + k * next)));
                sum[k] = _mm512_add_ps(sum[k], _mm512_permutex2var_ps(low, codes, high));
            }
        }
        for (int k = 0; k < TILES; k++) _mm512_storeu_ps(y + k * LANES, sum[k]);
    }
}
AVX512 static inline void add_products_avx512(ivec *sums, const int8_t *four, int odd, int32_t pair) {
    __m512i weights = _mm512_loadu_si512(four);
    weights = _mm512_srai_epi16(odd ? weights : _mm512_slli_epi16(weights, 8), 8);
    *sums += (ivec)_mm512_madd_epi16(weights, _mm512_set1_epi32(pair));
}

DEFINE_LOOK_UP_16(avx512, AVX512, vec, 16)
INSTANCE(avx512, AVX512)
#endif

static const kernels *choose_kernels(void) {
    const char *wanted = getenv("BOLT_KERNELS");
#if defined(__x86_64__)
    int has512 = __builtin_cpu_supports("fma") && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                 __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
    if (has512 && (!wanted || !strcmp(wanted, "avx512"))) return &avx512;
    int has2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
    if (has2 && (!wanted || !strcmp(wanted, "avx2"))) return &avx2;
#endif
    (void)wanted;
    return &portable;
}

/* ---- opening a file: everything is checked before it is used ---- */

static uint32_t checksum(const uint8_t *data, size_t size) {
    uint32_t table[256], c;
    for (uint32_t n = 0; n < 256; table[n++] = c) {
        c = n;
        for (int k = 0; k < 8; k++) c = c & 1 ? 0xEDB88320u ^ c >> 1 : c >> 1;
    }
    for (c = ~0u; size--;) c = table[(c ^ *data++) & 255] ^ c >> 8;
    return ~c;
}

static uint32_t read32(const uint8_t *place) {
    uint32_t value;
    memcpy(&value, place, 4);
    return value;
}

static int all_finite(const float *x, size_t count) {
    for (size_t i = 0; i < count; i++)
        if (!(x[i] - x[i] == 0)) return 0;
    return 1;
}

static size_t aligned(size_t bytes) { return rounded(bytes, ALIGNMENT); }

static const void *take(const uint8_t **at, size_t bytes) {
    const void *section = *at;
    *at += aligned(bytes);
    return section;
}

static int make_layer(ternary *layer, int rows, int cols, float first_scale, float second_scale) {
    layer->rows = rows;
    layer->cols = cols;
    layer->groups = (cols + 2) / 3;
    layer->tiles = (int)rounded((size_t)rows, TILES * LANES) / LANES;
    layer->scale[0] = first_scale;
    layer->scale[1] = second_scale;
    size_t codes = (size_t)layer->tiles * layer->groups * LANES;
    return (layer->codes = calloc(codes, 1)) != NULL;
}

/* Five weights a byte in the file become three a byte, in tiles, for `rows` rows. Returns 0 if one is not ternary. */
static int unpack(ternary *layer, const uint8_t *packed, int from, int rows) {
    static const uint8_t places[5] = {1, 3, 9, 27, 81};
    size_t n = 0;
    for (int row = from; row < from + rows; row++) {
        uint8_t *code = layer->codes + (size_t)(row / LANES) * layer->groups * LANES + row % LANES;
        for (int col = 0, sum = 0; col < layer->cols; col++, n++) {
            if (packed[n / 5] >= 243) return 0;
            sum += (packed[n / 5] / places[n % 5] % 3 - 1) * places[col % 3];
            if (col % 3 < 2 && col + 1 < layer->cols) continue;
            code[(size_t)(col / 3) * LANES] = (uint8_t)(sum < 0 ? NEGATIVE - sum : sum);
            sum = 0;
        }
    }
    return 1;
}

static int open_blocks(bolt_model *m, const uint8_t **at, int layer_scale, uint64_t attention, char *error, size_t room) {
    size_t D = m->width, H = m->hidden, K = m->kernel;
    for (int n = 0; n < m->blocks; n++) {
        block *b = &m->block[n];
        b->attention = attention >> n & 1;
        size_t channels = (b->attention ? 3 : 1) * D, projected = (b->attention ? 4 : 2) * D;
        b->mixer_norm = take(at, 4 * D);
        b->glu_norm = take(at, 4 * D);
        b->layer_scale = layer_scale ? take(at, 8 * D) : NULL;
        b->taps = take(at, 4 * K * channels);
        const float *scales = take(at, 4 * 5);
        const uint8_t *weights[5];
        size_t sizes[5] = {projected * D, D * D, H * D, H * D, D * H};
        for (int k = 0; k < 5; k++) weights[k] = take(at, (sizes[k] + 4) / 5);
        if (!all_finite(b->mixer_norm, D) || !all_finite(b->glu_norm, D) || !all_finite(b->taps, K * channels) ||
            !all_finite(scales, 5) || (layer_scale && !all_finite(b->layer_scale, 2 * D)))
            return fail(error, room, "block %d is not finite", n);
        if (!make_layer(&b->in, (int)projected, (int)D, scales[0], scales[0]) ||
            !make_layer(&b->out, (int)D, (int)D, scales[1], scales[1]) ||
            !make_layer(&b->gate_up, (int)(2 * H), (int)D, scales[2], scales[3]) ||
            !make_layer(&b->down, (int)D, (int)H, scales[4], scales[4]))
            return fail(error, room, "there is not enough memory");
        if (!unpack(&b->in, weights[0], 0, (int)projected) || !unpack(&b->out, weights[1], 0, (int)D) ||
            !unpack(&b->gate_up, weights[2], 0, (int)H) || !unpack(&b->gate_up, weights[3], (int)H, (int)H) ||
            !unpack(&b->down, weights[4], 0, (int)D))
            return fail(error, room, "the weights of block %d are not ternary", n);
        b->state = m->state_floats;
        m->state_floats += (K - 1) * channels + (b->attention ? 2 * (size_t)m->slots * D : 0);
        if (m->state_floats > LARGEST_STATE) return fail(error, room, "its state would be too large");
    }
    return 0;
}

/* The bytes of one of GPT-2's ids; room for LONGEST_TOKEN. */
static int token_bytes(const bolt_model *m, uint32_t id, uint8_t *out) {
    uint32_t stack[LONGEST_TOKEN + 1];
    int depth = 1, count = 0;
    stack[0] = id;
    while (depth) {
        uint32_t top = stack[--depth];
        if (top < BYTES) {
            out[count++] = m->byte_of[top];
        } else {
            stack[depth++] = m->merges[2 * (top - BYTES) + 1];
            stack[depth++] = m->merges[2 * (top - BYTES)];
        }
    }
    return count;
}

static int by_number(const void *a, const void *b) {
    uint64_t x = *(const uint64_t *)a, y = *(const uint64_t *)b;
    return (x > y) - (x < y);
}

static int open_vocabulary(bolt_model *m, const uint8_t *encoding, size_t bytes) {
    const uint8_t *end = encoding + bytes, *at = encoding + BYTES + 4 * MERGES;
    int seen[BYTES] = {0}, V = m->vocabulary;
    memcpy(m->byte_of, encoding, BYTES);
    m->merges = (const uint16_t *)(encoding + BYTES);
    m->pairs = malloc(sizeof(uint64_t) * MERGES);
    m->length = malloc(2 * (BYTES + MERGES));
    m->direct = calloc(BYTES + MERGES, 2);
    m->next = malloc(2 * (size_t)V);
    if (!m->pairs || !m->length || !m->direct || !m->next) return 0;
    for (int id = 0; id < BYTES; id++) {
        if (seen[m->byte_of[id]]++) return 0;
        m->id_of[m->byte_of[id]] = (uint8_t)id;
        m->length[id] = 1;
    }
    for (uint32_t n = 0; n < MERGES; n++) {
        uint32_t left = m->merges[2 * n], right = m->merges[2 * n + 1];
        if (left >= n + BYTES || right >= n + BYTES || m->length[left] + m->length[right] > LONGEST_TOKEN) return 0;
        m->length[n + BYTES] = (uint16_t)(m->length[left] + m->length[right]);
        m->pairs[n] = (uint64_t)left << 32 | right << 16 | n;
    }
    qsort(m->pairs, MERGES, sizeof *m->pairs, by_number);
    for (int id = V - 1; id >= SPECIALS; id--) {
        uint32_t theirs = m->kept[id - SPECIALS];
        uint8_t text[LONGEST_TOKEN];
        if (theirs >= BYTES + MERGES || m->direct[theirs]) return 0;
        m->direct[theirs] = (uint16_t)id;
        token_bytes(m, theirs, text);
        m->next[id] = m->first[text[0]];
        m->first[text[0]] = (uint16_t)id;
    }
    for (int id = 0; id < BYTES; id++)
        if (!m->direct[id]) return 0;
    for (int kind = 0; kind < CLASSES; kind++) {
        uint16_t pair[2], count;
        if (end - at < 2) return 0;
        memcpy(&count, at, 2);
        at += 2;
        if (end - at < 4 * (ptrdiff_t)count || !(m->classes[kind] = malloc(8 * (size_t)count + 8))) return 0;
        uint32_t code = 0;
        for (int n = 0; n < count; n++, at += 4) {
            memcpy(pair, at, 4);
            m->classes[kind][2 * n] = code += pair[0];
            m->classes[kind][2 * n + 1] = (code += pair[1]) - 1;
        }
        m->ranges[kind] = count;
    }
    return at == end;
}

static int open_sections(bolt_model *m, char *error, size_t room) {
    static const uint32_t limits[8] = {8192, 64, 65536, 1 << 20, 64, 50260, 8192, 65536};
    const uint8_t *f = m->file, *at = f + HEADER;
    uint32_t size[8], layer_scale = read32(f + 60), bits = read32(f + 64), encoding = read32(f + 68);
    uint64_t attention, bytes;
    memcpy(&bytes, f + 16, 8);
    memcpy(&attention, f + 72, 8);
    if (read32(f + 8) != VERSION)
        return fail(error, room, "it is of version %u and this program reads version %d: export it anew", read32(f + 8), VERSION);
    if (checksum(f + 16, HEADER - 16) != read32(f + 12)) return fail(error, room, "its header is damaged");
    int sensible = layer_scale <= 1 && (bits == 8 || bits == 32) && encoding >= BYTES + 4 * MERGES && encoding <= 1 << 20;
    for (int n = 0; n < 8; n++) {
        size[n] = read32(f + 28 + 4 * n);
        sensible &= size[n] >= 1 && size[n] <= limits[n];
    }
    if (!sensible || size[5] < SPECIALS + BYTES || (size[1] < 64 && attention >> size[1]) || size[0] % LANES || size[2] % LANES ||
        (attention && (size[0] % (size[6] * LANES) || size[0] / size[6] > 4096)))
        return fail(error, room, "its header makes no sense");
    m->width = (int)size[0], m->blocks = (int)size[1], m->hidden = (int)size[2], m->kernel = (int)size[4];
    m->vocabulary = (int)size[5], m->heads = (int)size[6], m->window = (int)size[7], m->bits = (int)bits;
    m->row = (int)rounded(size[5], LANES), m->slots = (int)rounded(size[7], LANES);
    uint64_t D = size[0], H = size[2], K = size[4], V = size[5], numbers = D * (uint64_t)m->row, expected = HEADER;
    for (uint32_t n = 0; n < size[1]; n++) {
        uint64_t attends = attention >> n & 1, weights[5] = {(attends ? 4 : 2) * D * D, D * D, H * D, H * D, D * H};
        expected += 2 * aligned(4 * D) + layer_scale * aligned(8 * D) + aligned(4 * K * D * (attends ? 3 : 1)) + aligned(20);
        for (int k = 0; k < 5; k++) expected += aligned((weights[k] + 4) / 5);
    }
    expected += aligned(4 * D) + (bits == 8 ? aligned(2 * V) + aligned(numbers) : aligned(4 * numbers));
    expected += aligned(2 * (V - SPECIALS)) + aligned(encoding);
    if (bytes != m->size || expected != m->size || expected > LARGEST_FILE)
        return fail(error, room, "it is truncated, or longer than it should be");
    if (checksum(at, m->size - HEADER) != read32(f + 24)) return fail(error, room, "its content is damaged");
    if (!(m->block = calloc(size[1], sizeof(block))) || !(m->scales = calloc((size_t)m->row, 4)))
        return fail(error, room, "there is not enough memory");
    if (open_blocks(m, &at, (int)layer_scale, attention, error, room)) return -1;
    m->norm = take(&at, 4 * D);
    const uint16_t *scales = bits == 8 ? take(&at, 2 * V) : NULL;
    for (uint64_t v = 0; v < V; v++) {
        uint32_t wide = bits == 8 ? (uint32_t)scales[v] << 16 : 0x3F800000;  /* a bfloat16 is the upper half of a float */
        memcpy(m->scales + v, &wide, 4);
    }
    if (bits == 8) m->embedding8 = take(&at, numbers);
    else m->embedding32 = take(&at, 4 * numbers);
    m->kept = take(&at, 2 * (V - SPECIALS));
    if (!all_finite(m->norm, D) || !all_finite(m->scales, V) || (bits == 32 && !all_finite(m->embedding32, numbers)))
        return fail(error, room, "its embedding is not finite");
    if (!open_vocabulary(m, at, encoding)) return fail(error, room, "its vocabulary makes no sense");
    return 0;
}

void bolt_close(bolt_model *m) {
    if (!m) return;
    for (int n = 0; m->block && n < m->blocks; n++) {
        block *b = &m->block[n];
        free(b->in.codes), free(b->out.codes), free(b->gate_up.codes), free(b->down.codes);
    }
    for (int kind = 0; kind < CLASSES; kind++) free(m->classes[kind]);
    free(m->block), free(m->scales), free(m->pairs), free(m->direct), free(m->length), free(m->next);
    if (m->file) munmap((void *)m->file, m->size);
    free(m);
}

/* A model, or NULL and one line in `error`. Until it is closed, the file must not be changed. */
bolt_model *bolt_open(const char *path, char *error, size_t room) {
    char why[200] = "there is not enough memory";
    struct stat status;
    bolt_model *m = calloc(1, sizeof *m);
    int file = open(path, O_RDONLY | O_NONBLOCK), good = 0;  /* a pipe would be waited for otherwise */
    if (file < 0 || fstat(file, &status)) {
        fail(why, sizeof why, "%s", strerror(errno));
    } else if (m && S_ISREG(status.st_mode) && status.st_size >= HEADER) {
        void *mapped = mmap(NULL, m->size = (size_t)status.st_size, PROT_READ, MAP_PRIVATE, file, 0);
        m->file = mapped == MAP_FAILED ? NULL : mapped;
        m->run = choose_kernels();
        if (!m->file) fail(why, sizeof why, "%s", strerror(errno));
        else if (memcmp(m->file, "FLASHLM", 8)) fail(why, sizeof why, "it is not a packed model");
        else good = !open_sections(m, why, sizeof why);
    } else if (m) {
        fail(why, sizeof why, "it is not a packed model");
    }
    if (file >= 0) close(file);
    if (good) return m;
    bolt_close(m);
    fail(error, room, "cannot use %s: %s", path, why);
    return NULL;
}

int bolt_vocabulary(const bolt_model *m) { return m->vocabulary; }

const char *bolt_kernels(const bolt_model *m) { return m->run->name; }

void bolt_end(bolt_state *s) {
    if (s) free(s->memory), free(s->scratch);
    free(s);
}

/* What one text, or 16 side by side, need while they are read or written. */
bolt_state *bolt_start(const bolt_model *m, int texts) {
    bolt_state *s = calloc(1, sizeof *s);
    size_t part[6];
    if (!s || (texts != 1 && texts != LANES)) return free(s), NULL;
    s->model = m;
    s->texts = texts;
    s->memory = calloc(m->state_floats * texts + 1, 4);
    s->scratch = aligned_alloc(ALIGNMENT, aligned(4 * scratch_floats(m, texts, part)));
    if (s->memory && s->scratch) return s;
    bolt_end(s);
    return NULL;
}

/* Forget what a text has read. */
void bolt_restart(bolt_state *s, int text) {
    s->start[text] = s->position;
    for (size_t n = 0; n < s->model->state_floats; n++) s->memory[n * s->texts + text] = 0;
}

/* Floats between the logits of one text and of the next. */
int bolt_row(const bolt_model *m) { return m->row; }

/* Read one id of each text; the logits of the next ones go to `logits` (texts, row), unless it is NULL. */
void bolt_step(bolt_state *s, const uint16_t *ids, float *logits) { s->model->run->step(s, ids, logits); }

/* ---- text to ids: GPT-2's byte-pair encoding, then the cut (vocab.py) ---- */

static int decode_utf8(const uint8_t *text, size_t room, uint32_t *code) {  /* bytes of the character, or 0 */
    static const uint32_t least[5] = {0, 0, 0x80, 0x800, 0x10000};
    int length = text[0] < 0x80 ? 1 : text[0] >> 5 == 6 ? 2 : text[0] >> 4 == 14 ? 3 : text[0] >> 3 == 30 ? 4 : 0;
    if (!length || (size_t)length > room) return 0;
    *code = length == 1 ? text[0] : text[0] & (0x7Fu >> length);
    for (int n = 1; n < length; n++) {
        if (text[n] >> 6 != 2) return 0;
        *code = *code << 6 | (text[n] & 0x3F);
    }
    return *code < least[length] || *code > 0x10FFFF || (*code >= 0xD800 && *code < 0xE000) ? 0 : length;
}

enum { LETTER, DIGIT, SPACE, OTHER };

static int kind_of(const bolt_model *m, uint32_t code) {
    for (int kind = LETTER; kind <= SPACE; kind++) {
        int low = 0, high = m->ranges[kind];
        while (low < high) {
            int middle = (low + high) / 2;
            if (m->classes[kind][2 * middle + 1] < code) low = middle + 1;
            else high = middle;
        }
        if (low < m->ranges[kind] && m->classes[kind][2 * low] <= code) return kind;
    }
    return OTHER;
}

/* The end of the run of one kind that starts at `at`, and where its last character starts. */
static size_t run_of(const bolt_model *m, const uint8_t *text, size_t at, size_t size, int kind, size_t *last) {
    uint32_t code;
    while (at < size) {
        int length = decode_utf8(text + at, size - at, &code);
        if (kind_of(m, code) != kind) break;
        *last = at;
        at += (size_t)length;
    }
    return at;
}

/* The end of the piece that GPT-2 encodes by itself: a contraction; letters, digits or other signs, perhaps with a space
 * before them; or white space, of which the last character goes to the word behind it. */
static size_t piece_end(const bolt_model *m, const uint8_t *text, size_t at, size_t size) {
    static const char *const endings[] = {"'s", "'d", "'m", "'t", "'ll", "'ve", "'re"};
    for (int n = 0; n < 7; n++)
        if (size - at >= strlen(endings[n]) && !memcmp(text + at, endings[n], strlen(endings[n])))
            return at + strlen(endings[n]);
    uint32_t code;
    size_t start = at + (text[at] == ' ' && at + 1 < size), last = at;
    decode_utf8(text + start, size - start, &code);
    int kind = kind_of(m, code);
    if (kind != SPACE) return run_of(m, text, start, size, kind, &last);
    size_t end = run_of(m, text, start, size, SPACE, &last);  /* beyond `at`, whatever the classes say of a space */
    return end < size && last > at ? last : end;
}

static uint32_t find_merge(const bolt_model *m, uint32_t left, uint32_t right) {  /* the id it makes, or NONE */
    uint64_t key = (uint64_t)left << 32 | right << 16;
    size_t low = 0, high = MERGES;
    while (low < high) {
        size_t middle = (low + high) / 2;
        if (m->pairs[middle] < key) low = middle + 1;
        else high = middle;
    }
    return low < MERGES && m->pairs[low] >> 16 == key >> 16 ? (uint32_t)(m->pairs[low] & 0xFFFF) + BYTES : NONE;
}

/* Merge the bytes of a piece, the earliest learned pair first; returns how many ids are left in `ids`. What a merge makes
 * is part of later merges only, so all places of the earliest pair can be merged at once. */
static size_t merge_piece(const bolt_model *m, const uint8_t *piece, size_t count, uint32_t *ids, uint32_t *made) {
    for (size_t n = 0; n < count; n++) ids[n] = m->id_of[piece[n]];
    for (size_t n = 0; n < count; n++) made[n] = n + 1 < count ? find_merge(m, ids[n], ids[n + 1]) : NONE;
    for (;;) {
        uint32_t earliest = NONE;
        for (size_t n = 0; n < count; n++) earliest = made[n] < earliest ? made[n] : earliest;
        if (earliest == NONE) return count;
        size_t kept = 0;
        for (size_t n = 0; n < count; n++, kept++) {
            int merged = made[n] == earliest;
            ids[kept] = merged ? earliest : ids[n];
            made[kept] = made[n += (size_t)merged];
        }
        count = kept;
        for (size_t n = 0; n < count; n++)
            if (ids[n] == earliest || (n + 1 < count && ids[n + 1] == earliest))
                made[n] = n + 1 < count ? find_merge(m, ids[n], ids[n + 1]) : NONE;
    }
}

/* One of GPT-2's ids as ours: itself, or again and again the longest kept piece that the rest of it starts with. */
static size_t cut(const bolt_model *m, uint32_t id, uint16_t *out) {
    if (m->direct[id]) return out[0] = m->direct[id], 1;
    uint8_t bytes[LONGEST_TOKEN], piece[LONGEST_TOKEN];
    int size = token_bytes(m, id, bytes), longest;
    size_t count = 0;
    for (int at = 0; at < size; at += longest, count++) {
        longest = 0;
        for (uint32_t ours = m->first[bytes[at]]; ours; ours = m->next[ours]) {
            uint32_t theirs = m->kept[ours - SPECIALS];
            int length = m->length[theirs];
            if (length <= longest || length > size - at) continue;
            token_bytes(m, theirs, piece);
            if (!memcmp(piece, bytes + at, (size_t)length)) longest = length, out[count] = (uint16_t)ours;
        }
    }
    return count;
}

/* UTF-8 to ids, at most one a byte. Returns how many, -1 if it is not UTF-8, -2 if there is not enough memory. */
long bolt_encode(const bolt_model *m, const uint8_t *text, size_t size, uint16_t *ids) {
    uint32_t code;
    for (size_t at = 0, length; at < size; at += length)
        if (!(length = (size_t)decode_utf8(text + at, size - at, &code))) return -1;
    uint32_t *work = malloc(8 * size + 8);
    if (!work) return -2;
    long count = 0;
    for (size_t at = 0, end; at < size; at = end) {
        end = piece_end(m, text, at, size);
        size_t merged = merge_piece(m, text + at, end - at, work, work + size);
        for (size_t n = 0; n < merged; n++) count += (long)cut(m, work[n], ids + count);
    }
    free(work);
    return count;
}

/* The bytes of one of our ids; room for 1,024. Returns how many. */
int bolt_token(const bolt_model *m, int id, uint8_t *text) {
    return id < SPECIALS ? 0 : token_bytes(m, m->kept[id - SPECIALS], text);
}

/* ---- scoring and sampling ---- */

typedef int bolt_listener(void *context, int story, int id);

/* Write on after `stories` prompts (BOS first; one behind the other, `lengths` of them), each up to EOS or the most tokens,
 * as many at once as the state has texts; story n draws with seed + n. ids: room for how->tokens a story; bits: as much, the
 * surprise of each id; counts: how many ids were written; finished: whether the model ended the story itself; listener: told
 * of each id, may be NULL, ends its story by returning something else than 0. After how->stop, counts and finished are set of some stories only.
 * Returns -1 without memory. */
int bolt_generate(bolt_state *s, int stories, const uint16_t *prompts, const long *lengths, const bolt_settings *how,
                  uint16_t *ids, float *bits, long *counts, int *finished, bolt_listener *listener, void *context) {
    const bolt_model *m = s->model;
    float *logits = malloc(4 * (size_t)m->row * s->texts), *powers = malloc(4 * (size_t)m->row);
    candidate *found = malloc(sizeof(candidate) * (size_t)(m->row + 1));
    const uint16_t *prompt[LANES];
    uint16_t next[LANES] = {0};
    uint64_t seed[LANES];
    long read[LANES];
    int story[LANES], begun = 0, ended = 0, good = logits && powers && found;
    for (int t = 0; t < LANES; t++) story[t] = -1;
    while (good && ended < stories && !(how->stop && *how->stop)) {
        int wanted = 0;
        for (int t = 0; t < s->texts; t++) {
            if (story[t] < 0 && begun < stories) {
                bolt_restart(s, t);
                prompt[t] = prompts, seed[t] = how->seed + begun, read[t] = 0;
                counts[begun] = 0, prompts += lengths[begun];
                story[t] = begun++;
            }
            if (story[t] < 0) continue;
            if (read[t] < lengths[story[t]]) next[t] = prompt[t][read[t]];
            wanted |= ++read[t] >= lengths[story[t]];
        }
        bolt_step(s, next, wanted ? logits : NULL);
        for (int t = 0; t < s->texts; t++) {
            int n = story[t];
            if (n < 0 || read[t] < lengths[n]) continue;
            float nats;
            int id = m->run->choose(m, logits + (size_t)t * m->row, how, &seed[t], powers, found, &nats);
            if (!(finished[n] = id == EOS)) {
                size_t place = (size_t)n * how->tokens + counts[n]++;
                bits[place] = nats * 1.44269504f;
                ids[place] = next[t] = (uint16_t)id;
            }
            if (finished[n] || (listener && listener(context, n, id)) || counts[n] == how->tokens) story[t] = -1, ended++;
        }
    }
    free(logits);
    free(powers);
    free(found);
    return good ? 0 : -1;
}

/* -ln p of each id after the first, given all before it. nats: room for length - 1. Returns -1 without memory. */
int bolt_score(bolt_state *s, const uint16_t *ids, long length, float *nats) {
    const bolt_model *m = s->model;
    float *logits = malloc(4 * (size_t)m->row);
    for (long n = 0; logits && n + 1 < length; n++) {
        bolt_step(s, ids + n, logits);
        nats[n] = m->run->nats(m, logits, ids[n + 1]);
    }
    free(logits);
    return logits ? 0 : -1;
}

/* ---- the program ---- */

#ifndef BOLT_LIBRARY
static int print_token(void *model, int story, int id) {
    uint8_t text[LONGEST_TOKEN];
    (void)story;
    fwrite(text, 1, (size_t)bolt_token(model, id, text), stdout);
    return fflush(stdout) != 0;
}

static int usage(const char *complaint, const char *what) {
    char line[300];
    fail(line, sizeof line, "%s%.100s", complaint, what);
    fprintf(stderr, "error: %s (usage: bolt MODEL PROMPT [-n TOKENS] [-t TEMPERATURE] [-k TOP_K] [-p TOP_P] [-s SEED])\n",
            line);
    return 2;
}

static int setting(const char *flag, const char *text, bolt_settings *how) {
    char *end;
    double value = strtod(text, &end);
    int whole = value >= 0 && value <= 1e9 && value == (double)(uint32_t)value;
    if (end == text || *end || !(value >= 0 && value <= 1e9)) return 0;
    if (!strcmp(flag, "-n") && whole && value >= 1) how->tokens = (int)value;
    else if (!strcmp(flag, "-t")) how->temperature = (float)value;
    else if (!strcmp(flag, "-k") && whole) how->top_k = (int)value;
    else if (!strcmp(flag, "-p") && value > 0 && value <= 1) how->top_p = (float)value;
    else if (!strcmp(flag, "-s") && whole) how->seed = (uint64_t)value;
    else return 0;
    return 1;
}

int main(int count, char **words) {
    bolt_settings how = {.tokens = 200, .temperature = 0.8f, .top_k = 0, .top_p = 0.95f, .seed = 0};
    char error[5000] = "there is not enough memory";
    if (count < 3) return usage("give a model and a prompt", "");
    for (int n = 3; n < count; n += 2)
        if (n + 1 == count || !setting(words[n], words[n + 1], &how)) return usage("cannot be used: ", words[n]);
    size_t size = strlen(words[2]);
    if (!size) return usage("the prompt is empty", "");
    bolt_model *m = bolt_open(words[1], error, sizeof error);
    bolt_state *s = m ? bolt_start(m, 1) : NULL;
    uint16_t *ids = malloc(2 * (size + 1)), *written = malloc(2 * (size_t)how.tokens);
    float *bits = malloc(4 * (size_t)how.tokens);
    long length = s && ids && written && bits ? bolt_encode(m, (const uint8_t *)words[2], size, ids + 1) : -2;
    if (length == -1) fail(error, sizeof error, "the prompt is not UTF-8: check the encoding of the terminal");
    int finished, status = 2;
    long written_count;
    if (length >= 0) {
        ids[0] = BOS;
        fputs(words[2], stdout);
        length++;
        status = bolt_generate(s, 1, ids, &length, &how, written, bits, &written_count, &finished, print_token, m) ? 2 : 0;
        putchar('\n');
        if (fflush(stdout)) status = fail(error, sizeof error, "cannot write: %s", strerror(errno)) ? 2 : 0;
    }
    if (status) fprintf(stderr, "error: %s\n", error);
    free(ids);
    free(written);
    free(bits);
    bolt_end(s);
    bolt_close(m);
    return status;
}
#endif
