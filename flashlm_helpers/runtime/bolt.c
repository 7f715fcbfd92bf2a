/* Run a packed FlashLM model: one file of C11 with the vector types of GCC and Clang, and no
 * library besides the C library.
 *
 *     cc -O3 bolt.c -o bolt && ./bolt model.flashlm "Once upon a time"
 *
 * The ternary layers never multiply by a weight. Any three weights of -1, 0 or +1 select one of 27
 * sums of three inputs. For each token we make all these sums once; then every row of the matrix
 * looks up its own and adds them. One scale per layer is multiplied in last.
 *
 * We run B texts at once, where B is 1 or 16. Activations of n channels have the shape (n, B), so
 * 16 floats in a row are 16 channels of one text, or one channel of 16 texts. One and the same loop
 * serves both.
 *
 * In this order: arithmetic, one token, sampling, kernels, opening a file, text to ids, scoring and
 * generating, the program. To see how a token is computed, start at step_body() and read upwards.
 *
 * Shapes: B texts, D width, H hidden, K kernel size, V vocabulary. packed.py describes the file.
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

// GCC notes that its way of passing these vectors has changed. Only inlined functions pass them.
#pragma GCC diagnostic ignored "-Wpsabi"

#define INLINE static inline __attribute__((always_inline))

// Every vocabulary starts with these ids. Their text is empty.
enum { PAD, UNK, BOS, EOS, SPECIALS };

// Kinds of characters. The file lists the first three.
enum { LETTER, DIGIT, SPACE, LISTED_KINDS, OTHER = LISTED_KINDS };

enum {
    LANES = 16,              // floats of a vector, rows of a tile, texts side by side
    TILES = 4,               // tiles come in fours; the last rows may lie beyond the matrix
    TABLE = 32,              // room of a table of 27 sums
    NEGATIVE = 16,           // entry 16 + k of a table is minus entry k
    OUT_OF_REACH = 1 << 30,  // distance of a slot that a text cannot see
    GROUPS_AT_ONCE = 16,     // tables of 16 texts at a time: 32 KB, for the fastest cache
};

// The logit of an id that is never written. Infinity would do, but not with -ffast-math.
static const float EXCLUDED = -3e38f;

// The file format, and the limits that packed.py keeps to.
enum {
    VERSION = 1,
    ALIGNMENT = 64,          // every section starts at a multiple of 64 bytes
    BYTES = 256,
    MERGES = 50000,
    GPT2_IDS = BYTES + MERGES,
    MAX_WIDTH = 8192,
    MAX_HEADS = 8192,
    MAX_HEAD_WIDTH = 4096,
    MAX_BLOCKS = 64,
    MAX_HIDDEN = 65536,
    MAX_SEQUENCE = 1 << 20,
    MAX_KERNEL = 64,
    MAX_WINDOW = 65536,
    MIN_VOCABULARY = SPECIALS + BYTES,
    MAX_VOCABULARY = 50260,
    MIN_ENCODING = BYTES + 4 * MERGES,
    MAX_ENCODING = 1 << 20,
    MAX_TOKEN_BYTES = 1024,  // the longest token of GPT-2 has 128
    MAX_FILE_BYTES = 1 << 30,
    MAX_STATE_FLOATS = 1 << 26,
};

// A vector of 16 floats is one register with AVX-512, two with AVX2, four elsewhere. The compiler
// splits it where it must; look_up_16_body() uses the smaller types to do so by hand.
typedef float vec __attribute__((vector_size(4 * LANES), may_alias));
typedef float vec8 __attribute__((vector_size(32), may_alias));
typedef float vec4 __attribute__((vector_size(16), may_alias));
typedef int32_t ivec __attribute__((vector_size(4 * LANES), may_alias));
typedef int8_t bytes __attribute__((vector_size(LANES)));

// The start of the file: 192 bytes, little-endian.
typedef struct {
    char magic[8];              // "FLASHLM" and a zero
    uint32_t version;
    uint32_t header_checksum;   // CRC-32 of what follows in the header
    uint64_t file_bytes;
    uint32_t content_checksum;  // CRC-32 of what follows the header
    int32_t width;              // D
    int32_t blocks;
    int32_t hidden;             // H
    int32_t sequence_length;
    int32_t kernel_size;        // K
    int32_t vocabulary_size;    // V
    int32_t heads;              // of attention
    int32_t window;             // of attention, in tokens
    int32_t layer_scale;        // 0 or 1: whether the blocks scale their outputs
    int32_t embedding_bits;     // 8 or 32
    int32_t encoding_bytes;     // of the last section
    uint64_t attention;         // bit n: whether block n attends
    char name[32];
    uint8_t vocabulary_hash[32];
    uint8_t unused[48];
} header;
_Static_assert(sizeof(header) == 192, "the header of the file has no gaps");

/* A ternary layer. Its codes lie in the order in which the kernels read them:
 *
 *              group 0 (inputs 0-2)    group 1 (inputs 3-5)    ...
 *            +-----------------------+-----------------------+----
 *     tile 0 | codes of rows  0 - 15 | codes of rows  0 - 15 | ...     16 bytes per cell,
 *            +-----------------------+-----------------------+----     one cell after another
 *     tile 1 | codes of rows 16 - 31 | codes of rows 16 - 31 | ...
 *            +-----------------------+-----------------------+----
 *
 * A code is the three weights that a row has for the inputs of a group, and the place of their sum
 * in the group's table: see make_table().
 */
typedef struct {
    int rows;                   // outputs
    int cols;                   // inputs
    int groups;                 // of three inputs, rounded up
    int tiles;                  // of 16 rows, rounded up to a multiple of TILES
    float scale[2];             // of the first and second half of the rows: gate and up are one
    uint8_t *codes;             // (tiles, groups, 16)
} ternary;

/* The embedding lies in tiles of 16 ids, which the head reads from front to back. A cell holds one
 * channel of the 16 ids with 32 bits, and four channels of each with 8 bits:
 *
 *     32 bits  | id 0: d0          | id 1: d0          | ... | id 15: d0          |  next cell: d1
 *      8 bits  | id 0: d0 d1 d2 d3 | id 1: d0 d1 d2 d3 | ... | id 15: d0 d1 d2 d3 |  next: d4 to d7
 *
 * So a cell is 64 bytes either way, and four channels of an id make one 32-bit integer.
 */
INLINE size_t embedding_index(int id, int d, int width, int channels_per_cell) {
    size_t cells = (size_t)(id / LANES) * (width / channels_per_cell) + d / channels_per_cell;
    return (cells * LANES + id % LANES) * channels_per_cell + d % channels_per_cell;
}

// Where the code of a row for a group of three inputs is.
INLINE size_t code_index(const ternary *layer, int row, int group) {
    return ((size_t)(row / LANES) * layer->groups + group) * LANES + row % LANES;
}

// One block: x += mixer(norm(x)), then x += GLU(norm(x)).
typedef struct {
    int attends;                // whether its mixer is attention, or else a gated convolution
    const float *mixer_norm;    // (D)
    const float *glu_norm;      // (D)
    const float *layer_scale;   // (2, D) of the mixer and of the GLU, or NULL
    const float *taps;          // (K, D), or (K, 3D) before attention
    const float *scales;        // (5) of the layers as packed
    const uint8_t *packed[5];   // in, out, gate, up, down: five weights per byte
    ternary in;                 // D -> 2D: gate, value; or D -> 4D: query, key, value, gate
    ternary out;                // D -> D
    ternary gate_up;            // D -> 2H
    ternary down;               // H -> D
    size_t state;               // where its part of bolt_state.memory starts, in floats per text
} block;

// GPT-2's byte-pair encoding, and those of its ids that this vocabulary keeps.
typedef struct {
    uint8_t byte_of[BYTES];     // byte of each GPT-2 id below 256
    uint8_t id_of[BYTES];       // GPT-2 id of each byte
    const uint16_t *merges;     // (MERGES, 2) the two ids that each id from 256 on is merged from
    uint64_t *pairs;            // (MERGES) left << 32 | right << 16 | number, sorted
    uint16_t *length;           // (GPT2_IDS) in bytes
    const uint16_t *kept;       // (V - SPECIALS) GPT-2 id of each of our ids
    uint16_t *ours;             // (GPT2_IDS) our id of each GPT-2 id, or 0
    uint16_t first[BYTES];      // our first id that starts with a byte
    uint16_t *next;             // (V) our next id that starts with the same byte, or 0
    uint32_t *ranges[LISTED_KINDS];  // (counts, 2) first and last code point of each range
    int counts[LISTED_KINDS];
} tokenizer;

typedef struct kernels kernels;

// A file that is open. Nothing of it changes after bolt_open(), so threads can share it.
typedef struct {
    char why[200];              // why it cannot be used, if so
    const uint8_t *file;        // mapped into memory
    size_t size;
    uint64_t taken;             // bytes of the file that take() has handed out
    header header;
    int row;                    // V rounded up to a multiple of 16: floats between rows of logits
    int slots;                  // window rounded up likewise: room for keys and values
    size_t state_floats;        // that one text remembers
    block *blocks;              // (blocks)
    const uint8_t *encoding;    // (encoding_bytes) the last section
    const float *norm;          // (D)
    const uint16_t *halves;     // (V) scales of the ids as bfloat16, with 8 bits
    const float *embedding32;   // (row / 16, D, 16), or NULL
    const int8_t *embedding8;   // (row / 16, D / 4, 16, 4), or NULL
    float *scales;              // (row) of the ids' bytes in embedding8
    tokenizer tokenizer;
    const kernels *run;         // for this processor
} bolt_model;

// B texts that are being read or written. Each thread has its own.
typedef struct {
    const bolt_model *model;
    int texts;                  // B: 1 or 16
    long position;              // tokens read so far
    long start[LANES];          // position at which each text began
    float *memory;              // (state_floats, B)
    // What follows holds one token.
    float *x;                   // (D, B) residual stream
    float *input;               // (max(D, H), B) of a ternary layer
    float *output;              // (max(2H, 4D), B) of a ternary layer
    float *mixed;               // (3D, B) query, key and value after their convolution
    float *attention;           // (slots, B) weights of one head
    float *distance;            // (slots, B) tokens back to each slot
    float *tables;              // (groups, 32), or (GROUPS_AT_ONCE, 32, 16)
} bolt_state;

typedef struct {
    int tokens;                 // to write at most
    float temperature;          // 0: greedy
    int top_k;                  // 0: all
    float top_p;                // 1: all
    uint64_t seed;
    const volatile int *stop;   // writing stops when another thread sets it to 1; may be NULL
} bolt_settings;

// An id that sampling may choose.
typedef struct {
    float weight;               // probability, not yet divided by the sum of all
    int id;
} candidate;

// What choosing an id needs, and what it finds out.
typedef struct {
    const bolt_model *model;
    const bolt_settings *how;
    float *weights;             // (row) room for a weight per id
    candidate *found;           // (row + 1)
    float surprise;             // of the id that was chosen: -ln p, before temperature and cuts
    float entropy;              // the mean of -ln p over all ids, likewise
} sampler;

static size_t round_up(size_t number, size_t step) { return (number + step - 1) / step * step; }

static int max_int(int a, int b) { return a > b ? a : b; }

static int min_int(int a, int b) { return a < b ? a : b; }

/* ---- arithmetic, without a mathematical library -------------------------------------------- */

// Loads and stores need no alignment; memcpy says so, and costs nothing.
INLINE vec load(const float *p) {
    vec v;
    memcpy(&v, p, sizeof v);
    return v;
}

INLINE void store(float *p, vec v) { memcpy(p, &v, sizeof v); }

INLINE vec splat(float x) { return x + (vec){0}; }

// A comparison of vectors gives -1 where it holds and 0 elsewhere: a mask of bits.
INLINE vec choose_lanes(ivec mask, vec yes, vec no) {
    return (vec)((mask & (ivec)yes) | (~mask & (ivec)no));
}

// NaN compares as false, so it becomes `least`.
INLINE vec at_least(vec x, float least) { return choose_lanes(x > least, x, splat(least)); }

INLINE vec at_most(vec x, float most) { return choose_lanes(x < most, x, splat(most)); }

INLINE float sum_lanes(vec v) {
    float total = 0;
    for (int lane = 0; lane < LANES; lane++) total += v[lane];
    return total;
}

// e^x = 2^n e^r, where n is the nearest integer to x / ln 2: a shifted exponent times a polynomial.
INLINE vec exponential(vec x) {
    x = at_most(at_least(x, -87.0f), 88.0f);

    // Floats from 2^23 on have no fractions, so adding 1.5 * 2^23 rounds. We take it off again as
    // integers: as floats, -ffast-math would leave out both, and with them the rounding.
    const float big = 12582912.0f;
    ivec whole = (ivec)(x * 1.44269504f + big) - (ivec)splat(big);
    vec n = __builtin_convertvector(whole, vec);

    // r = x - n ln 2, in two parts, as the first is exact.
    vec r = x - n * 0.693359375f + n * 2.12194440e-4f;

    // Cephes' polynomial for e^r with r up to ln 2 / 2.
    vec p = r * 1.9875691500e-4f + 1.3981999507e-3f;
    p = p * r + 8.3334519073e-3f;
    p = p * r + 4.1665795894e-2f;
    p = p * r + 1.6666665459e-1f;
    p = p * r + 5.0000001201e-1f;
    p = p * r * r + r + 1.0f;

    // An exponent of n, and no fraction, is 2^n.
    return p * (vec)((whole + 127) << 23);
}

// 1 / sqrt(x) of positive, normal numbers: a guess from the exponent, then Newton's method.
INLINE vec inverse_root(vec x) {
    vec y = (vec)(0x5F3759DF - ((ivec)x >> 1));
    for (int n = 0; n < 4; n++) y *= 1.5f - 0.5f * x * y * y;
    return y;
}

// ln x of a positive, normal number: its exponent, and a series for its mantissa.
static double logarithm(double x) {
    union {
        double value;
        uint64_t bits;
    } u = {.value = x};

    // x = m 2^exponent with m from 1 to below 2.
    int exponent = (int)(u.bits >> 52) - 1023;
    u.bits = (u.bits & 0xFFFFFFFFFFFFFull) | 0x3FF0000000000000ull;

    // ln m = 2 (t + t^3 / 3 + t^5 / 5 + ...), where t is at most 1 / 3.
    double t = (u.value - 1) / (u.value + 1);
    double sum = 0;
    for (int k = 27; k > 0; k -= 2) sum = sum * t * t + 1.0 / k;
    return 2 * t * sum + exponent * 0.69314718055994530942;
}

/* ---- one token of B texts ------------------------------------------------------------------ */

/* The way of a token:
 *
 *     ids (B)           embed          x (D, B), the residual stream
 *     in each block     mix            x += mixer(norm(x))
 *                       feed_forward   x += GLU(norm(x))
 *     in the end        head           logits (B, row) of norm(x)
 *
 * Each function of this section is inlined into a step() of every kind of processor, so it is
 * compiled for that processor, with B as a constant. What depends on B alone costs nothing.
 */

// What each kind of processor has of its own; see "kernels" below.
struct kernels {
    const char *name;
    void (*look_up)(const ternary *layer, const float *tables, float *y);
    void (*look_up_16)(const ternary *layer, int from, int count, const float *tables, float *y);
    void (*add_products)(ivec *sums, const int8_t *cell, int odd, int32_t pair);
    void (*step)(bolt_state *s, const uint16_t *ids, float *logits);
    int (*choose)(sampler *s, float *logits, uint64_t *seed);
    float (*score)(const bolt_model *m, const float *logits, int id);
};

// Multiply v, floats i to i + 15 of activations (n, B), by a parameter (n) of their channels.
INLINE vec times_channel(vec v, const float *p, int i, const int B) {
    if (B == 1) return v * load(p + i);
    return v * p[i / LANES];
}

// Multiply v, 16 channels of one text or one of 16 texts, by number n of each text: p (n, B).
INLINE vec times_text(vec v, const float *p, int n, const int B) {
    if (B == 1) return v * p[n];
    return v * load(p + n * LANES);
}

/* The table of a group of three inputs a, b, c holds all 27 sums w0 a + w1 b + w2 c with weights of
 * -1, 0 and 1. These weights are the digits of a number k = w0 + 3 w1 + 9 w2, from -13 to 13:
 *
 *     k       0   1   2      3   4      5          6      7          ...  13
 *     sum     0   a   b - a  b   b + a  c - b - a  c - b  c - b + a  ...  c + b + a
 *
 * Entry k of a table is the sum of k; entry 16 + k is that of -k, with the opposite sign. The last
 * group may lack inputs: every row has weights of 0 for these, so it does not matter what they are.
 */
static const vec ONES = {0, 1, -1, 0, 1, -1, 0, 1, -1, 0, 1, -1, 0, 1};
static const vec THREES = {0, 0, 1, 1, 1, -1, -1, -1, 0, 0, 0, 1, 1, 1};
static const vec NINES = {0, 0, 0, 0, 0, 1, 1, 1, 1, 1, 1, 1, 1, 1};

// x: (3, B); table: (32, B). Multiplying by these digits is how a vector adds and subtracts lane by
// lane; the weights of a model only choose entries.
INLINE void make_table(const float *x, float *table, const int B) {
    // The positive half of one text's table is a vector.
    if (B == 1) {
        vec sums = ONES * x[0] + THREES * x[1] + NINES * x[2];
        store(table, sums);
        store(table + NEGATIVE, -sums);
        return;
    }

    // Each entry of 16 texts' tables is one.
    vec a = load(x);
    vec b = load(x + LANES);
    vec c = load(x + 2 * LANES);
    for (int k = 0; k < 14; k++) {
        vec sum = a * ONES[k] + b * THREES[k] + c * NINES[k];
        store(table + k * LANES, sum);
        store(table + (NEGATIVE + k) * LANES, -sum);
    }
}

// s->output (rows, B) = layer (rows, cols) times s->input (cols, B). Most of the time goes here.
INLINE void ternary_matmul(const ternary *layer, bolt_state *s, const kernels *k, const int B) {
    const int rows = layer->rows;
    const int groups = layer->groups;
    float *tables = s->tables;
    float *y = s->output;

    // All tables of one text fit the fastest cache. Those of 16 texts do not, so they take turns.
    const int step = B == 1 ? groups : GROUPS_AT_ONCE;
    for (int from = 0; from < groups; from += step) {
        int count = min_int(step, groups - from);
        const float *x = s->input + 3 * from * B;
        for (int g = 0; g < count; g++) make_table(x + 3 * g * B, tables + g * TABLE * B, B);
        if (B == 1) k->look_up(layer, tables, y);
        else k->look_up_16(layer, from, count, tables, y);
    }

    // The scales restore the magnitude that the weights had before they became ternary.
    for (int i = 0; i < rows * B; i += LANES) {
        int half = i >= rows / 2 * B;
        store(y + i, load(y + i) * layer->scale[half]);
    }
}

// out = x / rms(x) * weight, of `count` channels; weight: one per channel, or NULL for none.
INLINE void rms_norm(const float *x, const float *weight, int count, float eps, float *out,
                     const int B) {
    // The lanes are channels of one text, whose squares are added up, or each of another text.
    vec squares = {0};
    for (int i = 0; i < count * B; i += LANES) squares += load(x + i) * load(x + i);
    if (B == 1) squares = splat(sum_lanes(squares));

    vec factor = inverse_root(squares / (float)count + eps);
    for (int i = 0; i < count * B; i += LANES) {
        vec normal = load(x + i) * factor;
        if (weight) normal = times_channel(normal, weight, i, B);
        store(out + i, normal);
    }
}

// out = x * sigmoid(gate), of `count` floats.
INLINE void multiply_by_sigmoid(const float *x, const float *gate, int count, float *out) {
    for (int i = 0; i < count; i += LANES)
        store(out + i, load(x + i) / (1.0f + exponential(-load(gate + i))));
}

// x += y * scale, of `count` floats; scale: one per channel, or NULL for none.
INLINE void add_residual(float *x, const float *y, const float *scale, int count, const int B) {
    for (int i = 0; i < count; i += LANES) {
        vec update = load(y + i);
        if (scale) update = times_channel(update, scale, i, B);
        store(x + i, load(x + i) + update);
    }
}

/* A block remembers, for each text:
 *
 *     past      (K - 1, channels)   inputs of the convolution: a ring
 *     keys      (D, slots)          with attention: a ring as well, of the tokens in the window
 *     values    (slots, D)
 *
 * Like everything else, they have B as their last dimension. Keys lie channel by channel, so a
 * vector holds one channel of 16 slots; values lie slot by slot.
 */

// Causal depthwise convolution. value: (channels, B), of this token; past: (K - 1, channels, B), a
// ring of those before it; taps: (K, channels), the newest last.
INLINE void convolve(const float *taps, int kernel, int channels, long position, float *past,
                     const float *value, float *mixed, const int B) {
    // The last tap is for the present.
    const int count = channels * B;
    const float *tap = taps + (size_t)(kernel - 1) * channels;
    for (int i = 0; i < count; i += LANES)
        store(mixed + i, times_channel(load(value + i), tap, i, B));
    if (kernel == 1) return;

    // The tap before it is for the token before, and so on.
    const int ring = kernel - 1;
    for (int back = 1; back < kernel; back++) {
        const float *row = past + (size_t)((position + ring - back) % ring) * count;
        tap -= channels;
        for (int i = 0; i < count; i += LANES)
            store(mixed + i, load(mixed + i) + times_channel(load(row + i), tap, i, B));
    }

    // This token takes the place of the oldest.
    memcpy(past + (size_t)(position % ring) * count, value, sizeof(float) * count);
}

// s->distance (slots, B): how many tokens ago each slot was filled; out of reach if that was before
// the text began.
INLINE void measure_distance(const bolt_state *s, int now, const int B) {
    const int window = s->model->header.window;
    for (int slot = 0; slot < s->model->slots; slot++) {
        // Slots are filled in turn, so those behind the present one are of the turn before.
        int back = now - slot;
        if (back < 0) back += window;
        if (slot >= window) back = OUT_OF_REACH;
        for (int t = 0; t < B; t++) {
            int seen = back <= s->position - s->start[t];
            s->distance[slot * B + t] = seen ? back : OUT_OF_REACH;
        }
    }
}

// s->attention (slots, B): the weight that a head gives to each slot, not yet divided by the sum of
// all, which is returned. query: (d, B); keys: (d, slots, B). Normalized queries and keys have no
// large scores, so e^score does not overflow.
INLINE vec weigh_slots(const bolt_state *s, const float *query, const float *keys, int d, int used,
                       float slope, const int B) {
    const int slots = s->model->slots;
    const float shrink = inverse_root(splat((float)d))[0];
    const float *distance = s->distance;
    float *weights = s->attention;
    vec total = {0};
    for (int i = 0; i < used * B; i += LANES) {
        // Query times key: 16 slots of one text, or one slot of 16.
        vec score = {0};
        for (int c = 0; c < d; c++)
            score += times_text(load(keys + (size_t)c * slots * B + i), query, c, B);

        // A slot out of reach gets no weight at all.
        vec far = load(distance + i);
        vec weight = exponential(score * shrink - far * slope);
        weight = choose_lanes(far < OUT_OF_REACH, weight, (vec){0});
        store(weights + i, weight);
        total += weight;
    }
    if (B == 1) total = splat(sum_lanes(total));
    return total;
}

// out (d, B) = mean of a head's values (used slots, D, B) by their weights, whose sum is `total`.
INLINE void average_values(const float *weights, const float *values, int d, int used, int stride,
                           vec total, float *out, const int B) {
    for (int i = 0; i < d * B; i += LANES) {
        vec sum = {0};
        for (int slot = 0; slot < used; slot++)
            sum += times_text(load(values + (size_t)slot * stride + i), weights, slot, B);
        store(out + i, sum / total);
    }
}

// Attend to the last `window` tokens. qkv: (3, D, B), changed; keys: (D, slots, B), with values
// (slots, D, B) behind them; out: (D, B).
INLINE void attend(const bolt_state *s, float *qkv, float *keys, float *out, const int B) {
    const bolt_model *m = s->model;
    const int D = m->header.width;
    const int heads = m->header.heads;
    const int window = m->header.window;
    const int d = D / heads;
    const int slots = m->slots;
    const int now = (int)(s->position % window);
    float *values = keys + (size_t)D * slots * B;

    // Normalize the heads of queries and keys.
    for (int h = 0; h < 2 * heads; h++)
        rms_norm(qkv + h * d * B, NULL, d, 1.1920929e-7f, qkv + h * d * B, B);

    // Key and value take the slot of the token that leaves the window.
    for (int c = 0; c < D; c++)
        for (int t = 0; t < B; t++)
            keys[((size_t)c * slots + now) * B + t] = qkv[(D + c) * B + t];
    memcpy(values + (size_t)now * D * B, qkv + 2 * D * B, sizeof(float) * D * B);

    // Until the window is full, the slots behind the present one are empty.
    measure_distance(s, now, B);
    int used = window;
    if (s->position < window) used = (int)s->position + 1;

    // Nearer tokens count more: the slopes of the heads run from 2^-1 to 2^-8 (arXiv:2108.12409).
    for (int h = 0; h < heads; h++) {
        float halvings = 1;
        if (heads > 1) halvings += 7.0f * h / (heads - 1);
        float slope = exponential(splat(-0.69314718f * halvings))[0];

        const int first = h * d * B;
        vec total = weigh_slots(s, qkv + first, keys + (size_t)first * slots, d, used, slope, B);
        average_values(s->attention, values + first, d, used, D * B, total, out + first, B);
    }
}

// x += mixer(norm(x)).
INLINE void mix(bolt_state *s, const block *b, const kernels *k, const int B) {
    const int D = s->model->header.width;
    const int kernel = s->model->header.kernel_size;
    float *x = s->x;
    float *input = s->input;
    float *output = s->output;
    float *past = s->memory + b->state * B;

    rms_norm(x, b->mixer_norm, D, 1e-6f, input, B);
    ternary_matmul(&b->in, s, k, B);
    if (b->attends) {
        // Query, key, value and gate: the first three pass the convolution, then attention.
        float *keys = past + (size_t)(kernel - 1) * 3 * D * B;
        convolve(b->taps, kernel, 3 * D, s->position, past, output, s->mixed, B);
        attend(s, s->mixed, keys, input, B);
        multiply_by_sigmoid(input, output + 3 * D * B, D * B, input);
    } else {
        // Gate and value: the value passes the convolution.
        convolve(b->taps, kernel, D, s->position, past, output + D * B, input, B);
        multiply_by_sigmoid(input, output, D * B, input);
    }

    // Back to the stream.
    ternary_matmul(&b->out, s, k, B);
    add_residual(x, output, b->layer_scale, D * B, B);
}

// x += down(silu(gate) * up), of norm(x).
INLINE void feed_forward(bolt_state *s, const block *b, const kernels *k, const int B) {
    const int D = s->model->header.width;
    const int H = s->model->header.hidden;
    float *x = s->x;
    float *input = s->input;
    float *gate = s->output;
    float *up = gate + H * B;

    // silu(gate) = gate * sigmoid(gate).
    rms_norm(x, b->glu_norm, D, 1e-6f, input, B);
    ternary_matmul(&b->gate_up, s, k, B);
    multiply_by_sigmoid(gate, gate, H * B, input);
    for (int i = 0; i < H * B; i += LANES) store(input + i, load(input + i) * load(up + i));

    // Back to the stream.
    ternary_matmul(&b->down, s, k, B);
    const float *scale = NULL;
    if (b->layer_scale) scale = b->layer_scale + D;
    add_residual(x, s->output, scale, D * B, B);
}

// x (D, B) = the embedding of each text's id.
INLINE void embed(const bolt_model *m, const uint16_t *ids, float *x, const int B) {
    const int D = m->header.width;

    // One of the two forms is there.
    for (int t = 0; t < B; t++) {
        const int id = ids[t];
        for (int d = 0; d < D && m->embedding32; d++)
            x[d * B + t] = m->embedding32[embedding_index(id, d, D, 1)];
        for (int d = 0; d < D && m->embedding8; d++)
            x[d * B + t] = m->embedding8[embedding_index(id, d, D, 4)] * m->scales[id];
    }
}

// logits (B, row) = embedding times x (D, B), with 32 bits.
INLINE void head32(const bolt_model *m, const float *x, float *logits, const int B) {
    const int D = m->header.width;
    const int row = m->row;

    // Each addition waits for the one before it. 16 texts have 16 sums to go on with meanwhile; one
    // text gets 8, which take turns.
    const int turns = B == 1 ? 8 : 1;
    for (int v = 0; v < row; v += LANES) {
        const float *weights = m->embedding32 + embedding_index(v, 0, D, 1);
        vec sums[LANES] = {{0}};
        for (int d = 0; d < D; d += 8)
            for (int k = 0; k < 8; k++)
                for (int t = 0; t < B; t++)
                    sums[k % turns + t] += load(weights + (d + k) * LANES) * x[(d + k) * B + t];

        for (int k = 1; k < turns; k++) sums[0] += sums[k];
        for (int t = 0; t < B; t++) store(logits + (size_t)t * row + v, sums[t]);
    }
}

/* Round one text's inputs to integers from -limit to limit; returns what an integer of 1 is worth.
 *
 * They become pairs (D / 2, B, 2), in the order in which add_products() takes the channels out of a
 * cell of the embedding: the even ones, then the odd ones.
 *
 *     channels   0 2 | 1 3 | 4 6 | 5 7 | 8 10 | ...
 */
INLINE float quantize(const float *x, int width, float limit, int16_t *pairs, int t, const int B) {
    // The largest input becomes the limit.
    float top = 1e-30f;
    for (int d = 0; d < width; d++) {
        float size = __builtin_fabsf(x[d * B + t]);
        if (size > top) top = size;
    }
    for (int d = 0; d < width; d++) {
        // A damaged model may give anything, also NaN.
        float y = x[d * B + t] * (limit / top);
        if (!(y < limit)) y = limit;
        if (y < -limit) y = -limit;

        int pair = d / 4 * 2 + d % 2;
        pairs[(pair * B + t) * 2 + d % 4 / 2] = (int16_t)(y + (y < 0 ? -0.5f : 0.5f));
    }
    return top / limit;
}

// logits (B, row) = embedding times x (D, B), with 8 bits. The inputs are rounded to 16 bits, or to
// fewer where sums of D products would not fit 32; the rest is exact.
INLINE void head8(const bolt_model *m, const float *x, float *logits, int16_t *pairs,
                  const kernels *kernels, const int B) {
    const int D = m->header.width;
    const int row = m->row;
    float limit = 32767;
    if (D > 512) limit = (float)(0x7FFFFFFF / 128 / D);
    float unit[LANES];
    for (int t = 0; t < B; t++) unit[t] = quantize(x, D, limit, pairs, t, B);

    // Sums take turns as in head32().
    const int turns = B == 1 ? 4 : 1;
    for (int v = 0; v < row; v += LANES) {
        const int8_t *cells = m->embedding8 + embedding_index(v, 0, D, 4);
        ivec sums[LANES] = {{0}};
        for (int n = 0; n < D / 2; n += turns)
            for (int k = 0; k < turns; k++) {
                const int8_t *cell = cells + (n / 2 + k / 2) * 4 * LANES;
                for (int t = 0; t < B; t++) {
                    int32_t pair;
                    memcpy(&pair, pairs + 2 * ((n + k) * B + t), sizeof pair);
                    kernels->add_products(&sums[k + t], cell, (n + k) % 2, pair);
                }
            }

        // Back to floats: the scale of each id times that of the inputs.
        for (int k = 1; k < turns; k++) sums[0] += sums[k];
        for (int t = 0; t < B; t++) {
            vec scale = load(m->scales + v) * unit[t];
            store(logits + (size_t)t * row + v, __builtin_convertvector(sums[t], vec) * scale);
        }
    }
}

// Read one id of each text. logits: (B, row), of what follows, or NULL if nobody needs them.
INLINE void step_body(bolt_state *s, const uint16_t *ids, float *logits, const kernels *k,
                      const int B) {
    const bolt_model *m = s->model;
    embed(m, ids, s->x, B);
    for (int n = 0; n < m->header.blocks; n++) {
        mix(s, &m->blocks[n], k, B);
        feed_forward(s, &m->blocks[n], k, B);
    }
    s->position++;
    if (!logits) return;

    // The head shares its weights with the embedding.
    rms_norm(s->x, m->norm, m->header.width, 1e-6f, s->input, B);
    if (m->embedding8) head8(m, s->input, logits, (int16_t *)s->output, k, B);
    else head32(m, s->input, logits, B);

    // What fills up a row is no id.
    for (int t = 0; t < B; t++)
        for (int v = m->header.vocabulary_size; v < m->row; v++)
            logits[(size_t)t * m->row + v] = EXCLUDED;
}

INLINE void step_any(bolt_state *s, const uint16_t *ids, float *logits, const kernels *k) {
    if (s->texts == 1) step_body(s, ids, logits, k, 1);
    else step_body(s, ids, logits, k, LANES);
}

/* ---- sampling from a row of logits --------------------------------------------------------- */

/* The probability of id n is e^(x_n - top) / S, where x are the logits, top is the largest of them
 * and S is the sum of e^(x_n - top) over all ids. To draw, nobody has to divide by S: the
 * numerators are weights, and a random point from 0 to their sum falls on one of them.
 *
 * A row of logits is long for a model as small as this. So the passes over it take 16 at a time,
 * and only few candidates are looked at one by one.
 */

// The largest of `count` logits, a multiple of 16.
INLINE float largest(const float *x, int count) {
    // Four at a time, as each comparison waits for the one before it.
    vec tops[4] = {load(x), load(x), load(x), load(x)};
    for (int i = 0; i < count; i += 4 * LANES)
        for (int k = 0; k < 4; k++) {
            vec v = load(x + min_int(i + k * LANES, count - LANES));
            tops[k] = choose_lanes(v > tops[k], v, tops[k]);
        }

    float top = x[0];
    for (int k = 0; k < 4; k++)
        for (int lane = 0; lane < LANES; lane++)
            if (tops[k][lane] > top) top = tops[k][lane];
    return top;
}

// weights = exp((x - top) / temperature); returns their sum.
INLINE float weigh_ids(const float *x, int count, float top, float temperature, float *weights) {
    // Above this, all ids are as likely as one another, but for those that are excluded.
    if (!(temperature < 1e30f)) temperature = 1e30f;
    const float factor = 1 / temperature;
    vec sum = {0};
    for (int i = 0; i < count; i += LANES) {
        vec weight = exponential((load(x + i) - top) * factor);
        store(weights + i, weight);
        sum += weight;
    }
    return sum_lanes(sum);
}

// ln of the sum of exp(x - top); the entropy in nats goes to `entropy`, unless it is NULL.
INLINE double log_sum(const float *x, int count, float top, float *entropy) {
    vec sum = {0};
    vec weighted = {0};

    // An excluded id is very far below; e^-87 is 0 for all that matters, and times -87 as well.
    for (int i = 0; i < count; i += LANES) {
        vec below = at_least(load(x + i) - top, -87.0f);
        vec weight = exponential(below);
        sum += weight;
        weighted += weight * below;
    }

    // With p = e^below / S, the mean of -ln p is ln S - sum(e^below * below) / S.
    float total = sum_lanes(sum);
    double result = logarithm(total);
    if (entropy) *entropy = (float)(result - sum_lanes(weighted) / total);
    return result;
}

// -ln p of an id, in nats.
INLINE float surprise_of(int id, const float *logits, int row, float top, float *entropy) {
    return (float)(log_sum(logits, row, top, entropy) - (logits[id] - top));
}

// A random number from 0 to below 1: splitmix64.
static double draw(uint64_t *seed) {
    // The 53 highest bits become a double, which has as many.
    uint64_t z = *seed += 0x9E3779B97F4A7C15ull;
    z = (z ^ z >> 30) * 0xBF58476D1CE4E5B9ull;
    z = (z ^ z >> 27) * 0x94D049BB133111EBull;
    return (double)((z ^ z >> 31) >> 11) / 9007199254740992.0;
}

static float total_weight(const candidate *all, int count) {
    float total = 0;
    for (int n = 0; n < count; n++) total += all[n].weight;
    return total;
}

static void swap(candidate *a, candidate *b) {
    candidate c = *a;
    *a = *b;
    *b = c;
}

// Move to the front the fewest of the likeliest whose weights reach `enough`, or `number` of them;
// returns how many. This is quicksort that goes on only on the side where the border is, since
// sorting all of them would take longer than the model does.
static int keep_likeliest(candidate *all, int count, int number, float enough) {
    // Those before `from` are kept, those at `to` and behind are not; the rest is open. Each round
    // settles one at least; we count, as a damaged model may have weights that are no numbers.
    int from = 0;
    int to = count;
    float kept = 0;
    for (int rounds = 0; rounds < count && from < to && from < number && kept < enough; rounds++) {
        // Those above the pivot come first.
        float pivot = all[from + (to - from) / 2].weight;
        float above = 0;
        int greater = from;
        for (int n = from; n < to; n++)
            if (all[n].weight > pivot) {
                above += all[n].weight;
                swap(&all[n], &all[greater++]);
            }
        if (greater > number || kept + above >= enough) {
            to = greater;
            continue;
        }

        // They are not enough: keep all, and as many of those that equal the pivot as it takes.
        from = greater;
        kept += above;
        int equal = from;
        for (int n = from; n < to; n++)
            if (all[n].weight == pivot) swap(&all[n], &all[equal++]);
        while (from < equal && from < number && kept < enough) kept += all[from++].weight;
    }
    return min_int(from, to);
}

// Collect the ids from EOS on whose weights are at least `least`; returns how many.
INLINE int collect(const float *weights, int vocabulary, float least, candidate *found) {
    int count = 0;
    for (int i = 0; i < vocabulary; i += LANES) {
        // Nearly all lanes are too small, mostly all 16 of them.
        bytes enough = __builtin_convertvector(load(weights + i) >= least, bytes);
        uint64_t halves[2];
        memcpy(halves, &enough, sizeof halves);
        if (!(halves[0] | halves[1])) continue;

        // Without a branch: every id is written down, and the next one over it unless it counts.
        for (int id = i; id < i + LANES; id++) {
            found[count] = (candidate){weights[id], id};
            count += weights[id] >= least && id >= EOS && id < vocabulary;
        }
    }
    return count;
}

// Collect as many of the likeliest ids as top-k and top-p can need; returns how many. Mostly these
// are the few with more than a thousandth of the largest weight.
INLINE int collect_enough(const float *weights, int vocabulary, int top_k, float top_p, float total,
                          candidate *found) {
    if (top_k == vocabulary && top_p >= 1) return collect(weights, vocabulary, 1e-12f, found);
    int count = 0;
    for (float least = 1e-3f; least > 1e-36f; least *= 1e-3f) {
        count = collect(weights, vocabulary, least, found);
        if (count >= top_k) break;
        if (top_k == vocabulary && total_weight(found, count) >= top_p * total) break;
    }
    return count;
}

// Draw an id from a row of logits whose largest is `top`: by temperature, then top-k, then top-p.
INLINE int sample(sampler *s, const float *logits, float top, uint64_t *seed) {
    const bolt_model *m = s->model;
    const int V = m->header.vocabulary_size;
    const float top_p = s->how->top_p;
    int top_k = V;
    if (s->how->top_k > 0) top_k = min_int(s->how->top_k, V);
    candidate *found = s->found;

    float total = weigh_ids(logits, m->row, top, s->how->temperature, s->weights);
    int count = collect_enough(s->weights, V, top_k, top_p, total, found);
    if (top_k < V) {
        count = keep_likeliest(found, count, top_k, 3e38f);
        total = total_weight(found, count);
    }
    if (top_p < 1) {
        // However small top-p is, one id is left.
        float enough = top_p * total;
        if (!(enough > 0)) enough = 1e-30f;
        count = keep_likeliest(found, count, V, enough);
    }

    // Each candidate is a stretch of a line as long as its weight. A random point picks one.
    double point = draw(seed) * total_weight(found, count);
    int id = EOS;
    for (int n = 0; n < count; n++) {
        id = found[n].id;
        point -= found[n].weight;
        if (point < 0) break;
    }
    return id;
}

INLINE int greedy(const bolt_model *m, const float *logits, float top) {
    int id = EOS;
    while (id < m->header.vocabulary_size - 1 && logits[id] != top) id++;
    return id;
}

// Choose the next id of a text. Surprise and entropy are those of the model itself, whatever the
// settings are.
INLINE int choose_body(sampler *s, float *logits, uint64_t *seed) {
    // These are never written.
    logits[PAD] = logits[UNK] = logits[BOS] = EXCLUDED;

    const int row = s->model->row;
    float top = largest(logits, row);
    int id;
    if (s->how->temperature < 1e-6f) id = greedy(s->model, logits, top);
    else id = sample(s, logits, top, seed);
    s->surprise = surprise_of(id, logits, row, top, &s->entropy);
    return id;
}

INLINE float score_body(const bolt_model *m, const float *logits, int id) {
    return surprise_of(id, logits, m->row, largest(logits, m->row), NULL);
}

/* ---- kernels: all of the above, for each kind of processor --------------------------------- */

/* There are three kinds: "portable" runs anywhere, "avx2" and "avx512" run on x86-64. Each has
 * three functions of its own for the innermost loops, and three that KERNELS() compiles for it from
 * the bodies above: the target of a function is also that of everything inlined into it.
 *
 *     look_up         y (rows) = sums that the codes of one text find in its tables
 *     look_up_16      the same for 16 texts: y (rows, 16)
 *     add_products    the inner step of the head with 8 bits
 */

// The look-ups stay functions of their own, so that a profiler shows them.
#define NOINLINE __attribute__((noinline))

// sum += x, of as many floats as a processor adds with one instruction.
INLINE void add_floats(float *sum, const float *x, const int width) {
    if (width == 4) *(vec4 *)sum += *(const vec4 *)x;
    if (width == 8) *(vec8 *)sum += *(const vec8 *)x;
    if (width == 16) *(vec *)sum += *(const vec *)x;
}

// Copy as many.
INLINE void copy_floats(float *to, const float *from, const int width) {
    if (width == 4) *(vec4 *)to = *(const vec4 *)from;
    if (width == 8) *(vec8 *)to = *(const vec8 *)from;
    if (width == 16) *(vec *)to = *(const vec *)from;
}

// For 16 texts: add to y (rows, 16) what `count` groups from `from` on look up, or start y with it.
// tables: (count, 32, 16).
//
// `rows` times `width` sums stay in registers while all groups are added to them, so a processor
// with registers of 4 floats takes a fourth of the texts at a time.
INLINE void look_up_16_body(const ternary *layer, int from, int count, const float *tables,
                            float *y, const int rows, const int width) {
    static const float zeros[LANES] __attribute__((aligned(64)));
    for (int row = 0; row < layer->tiles * LANES; row += rows)
        for (int part = 0; part < LANES; part += width) {
            // Go on with the sums of the groups before.
            float *out = y + row * LANES + part;
            float sums[LANES * LANES] __attribute__((aligned(64)));
            for (int r = 0; r < rows; r++)
                copy_floats(sums + r * width, from ? out + r * LANES : zeros, width);

            // A row adds the entry that its code names. Loading takes the time here, so one load
            // fetches eight codes.
            const uint8_t *code = layer->codes + code_index(layer, row, from);
            const float *table = tables + part;
            for (int g = 0; g < count; g++, code += LANES, table += TABLE * LANES)
                for (int r = 0; r < rows; r += 8) {
                    uint64_t codes;
                    memcpy(&codes, code + r, sizeof codes);
                    for (int k = 0; k < 8; k++, codes >>= 8)
                        add_floats(sums + (r + k) * width, table + (codes & 255) * LANES, width);
                }

            for (int r = 0; r < rows; r++) copy_floats(out + r * LANES, sums + r * width, width);
        }
}

// Any processor: one text looks up its sums one by one.
NOINLINE static void look_up_portable(const ternary *layer, const float *tables, float *y) {
    const uint8_t *code = layer->codes;
    for (int tile = 0; tile < layer->tiles; tile++, y += LANES) {
        float sums[LANES] = {0};
        const float *table = tables;
        for (int g = 0; g < layer->groups; g++, code += LANES, table += TABLE)
            for (int lane = 0; lane < LANES; lane++) sums[lane] += table[code[lane]];
        memcpy(y, sums, sizeof sums);
    }
}

NOINLINE static void look_up_16_portable(const ternary *layer, int from, int count,
                                         const float *tables, float *y) {
    look_up_16_body(layer, from, count, tables, y, 8, 4);
}

// Add to the sums of 16 ids two of the four channels in a cell of the embedding, times a pair of
// inputs: channels 0 and 2, or the odd ones, 1 and 3. Those of an id are the bytes of an integer,
// and shifting left, then right, cuts one out with its sign.
static inline void add_products_portable(ivec *sums, const int8_t *cell, int odd, int32_t pair) {
    ivec weights;
    memcpy(&weights, cell, sizeof weights);
    ivec first = weights << (24 - 8 * odd) >> 24;
    ivec second = weights << (8 - 8 * odd) >> 24;
    *sums += first * (int16_t)pair + second * (pair >> 16);
}

// The bodies above, and all that is inlined into them, for one kind of processor; then its kernels.
#define KERNELS(kind, TARGET)                                                                   \
    static const kernels kind;                                                                  \
    TARGET static void step_##kind(bolt_state *s, const uint16_t *ids, float *logits) {         \
        step_any(s, ids, logits, &kind);                                                        \
    }                                                                                           \
    TARGET static int choose_##kind(sampler *s, float *logits, uint64_t *seed) {                \
        return choose_body(s, logits, seed);                                                    \
    }                                                                                           \
    TARGET static float score_##kind(const bolt_model *m, const float *logits, int id) {        \
        return score_body(m, logits, id);                                                       \
    }                                                                                           \
    static const kernels kind = {                                                               \
        #kind, look_up_##kind, look_up_16_##kind, add_products_##kind,                          \
        step_##kind, choose_##kind, score_##kind,                                               \
    };

KERNELS(portable, )

#if defined(__x86_64__)
#define AVX2 __attribute__((target("avx2,fma")))
#define AVX512 __attribute__((target("avx512f,avx512bw,avx512dq,avx512vl,fma")))

// Look up eight codes at once. The positive sums of a table fit two registers, `low` and `high`. In
// a code, bits 0 to 2 choose the lane, bit 3 the register, and bit 4 turns the sign.
AVX2 static inline __m256 find_8(__m256 low, __m256 high, const uint8_t *code) {
    __m256i codes = _mm256_cvtepu8_epi32(_mm_loadl_epi64((const __m128i *)code));

    // The instructions look at the highest bit of a lane only, so the bit is shifted there.
    __m256 is_high = _mm256_castsi256_ps(_mm256_slli_epi32(codes, 28));
    __m256 found = _mm256_blendv_ps(_mm256_permutevar8x32_ps(low, codes),
                                    _mm256_permutevar8x32_ps(high, codes), is_high);
    __m256 is_negative = _mm256_castsi256_ps(_mm256_slli_epi32(codes, 27));
    return _mm256_xor_ps(found, _mm256_and_ps(is_negative, _mm256_set1_ps(-0.0f)));
}

AVX2 NOINLINE static void look_up_avx2(const ternary *layer, const float *tables, float *y) {
    const size_t next = (size_t)layer->groups * LANES;
    const float *end = tables + layer->groups * TABLE;

    // Two tiles at a time: four registers of sums, which need not wait for each other.
    for (int tile = 0; tile < layer->tiles; tile += 2, y += 2 * LANES) {
        const uint8_t *code = layer->codes + tile * next;
        __m256 sums[4];
        for (int k = 0; k < 4; k++) sums[k] = _mm256_setzero_ps();

        for (const float *table = tables; table < end; table += TABLE, code += LANES) {
            __m256 low = _mm256_loadu_ps(table);
            __m256 high = _mm256_loadu_ps(table + 8);
            for (int k = 0; k < 4; k++) {
                const uint8_t *eight = code + k / 2 * next + k % 2 * 8;
                sums[k] = _mm256_add_ps(sums[k], find_8(low, high, eight));
            }
        }
        for (int k = 0; k < 4; k++) _mm256_storeu_ps(y + 8 * k, sums[k]);
    }
}

AVX2 NOINLINE static void look_up_16_avx2(const ternary *layer, int from, int count,
                                          const float *tables, float *y) {
    look_up_16_body(layer, from, count, tables, y, 8, 8);
}

// Half of a 32-bit integer holds an even and an odd byte. Shifts leave one of them, as 16 bits, and
// one instruction multiplies both halves and adds the products.
AVX2 static inline void add_products_avx2(ivec *sums, const int8_t *cell, int odd, int32_t pair) {
    for (int half = 0; half < 2; half++) {
        __m256i *sum = (__m256i *)sums + half;
        __m256i weights = _mm256_loadu_si256((const __m256i *)cell + half);
        if (!odd) weights = _mm256_slli_epi16(weights, 8);
        weights = _mm256_srai_epi16(weights, 8);
        *sum = _mm256_add_epi32(*sum, _mm256_madd_epi16(weights, _mm256_set1_epi32(pair)));
    }
}

KERNELS(avx2, AVX2)

// A whole table fits two registers, and one instruction looks up 16 codes. Four tiles at a time
// hide how long an addition takes.
AVX512 NOINLINE static void look_up_avx512(const ternary *layer, const float *tables, float *y) {
    const size_t next = (size_t)layer->groups * LANES;
    const float *end = tables + layer->groups * TABLE;
    for (int tile = 0; tile < layer->tiles; tile += TILES, y += TILES * LANES) {
        const uint8_t *code = layer->codes + tile * next;
        __m512 sums[TILES];
        for (int k = 0; k < TILES; k++) sums[k] = _mm512_setzero_ps();

        for (const float *table = tables; table < end; table += TABLE, code += LANES) {
            __m512 low = _mm512_loadu_ps(table);
            __m512 high = _mm512_loadu_ps(table + LANES);
            for (int k = 0; k < TILES; k++) {
                __m128i sixteen = _mm_loadu_si128((const __m128i *)(code + k * next));
                __m512i codes = _mm512_cvtepu8_epi32(sixteen);
                sums[k] = _mm512_add_ps(sums[k], _mm512_permutex2var_ps(low, codes, high));
            }
        }
        for (int k = 0; k < TILES; k++) _mm512_storeu_ps(y + k * LANES, sums[k]);
    }
}

AVX512 NOINLINE static void look_up_16_avx512(const ternary *layer, int from, int count,
                                              const float *tables, float *y) {
    look_up_16_body(layer, from, count, tables, y, 16, 16);
}

AVX512 static inline void add_products_avx512(ivec *sums, const int8_t *cell, int odd,
                                              int32_t pair) {
    __m512i weights = _mm512_loadu_si512(cell);
    if (!odd) weights = _mm512_slli_epi16(weights, 8);
    weights = _mm512_srai_epi16(weights, 8);
    *sums += (ivec)_mm512_madd_epi16(weights, _mm512_set1_epi32(pair));
}

KERNELS(avx512, AVX512)

static int has_avx2(void) {
    return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
}

static int has_avx512(void) {
    return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
           __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl") &&
           __builtin_cpu_supports("fma");
}
#endif

// The fastest kernels of this processor, or those that BOLT_KERNELS names, if it has them.
static const kernels *choose_kernels(void) {
#if defined(__x86_64__)
    const char *wanted = getenv("BOLT_KERNELS");
    if (has_avx512() && (!wanted || !strcmp(wanted, "avx512"))) return &avx512;
    if (has_avx2() && (!wanted || !strcmp(wanted, "avx2"))) return &avx2;
#endif
    return &portable;
}

/* ---- opening a file ------------------------------------------------------------------------ */

/* A file may be damaged, or made to do harm, so everything is checked before it is used: the header
 * before its sizes, the sizes before the sections are looked for, length and checksum before a
 * section is read, and its content before a model runs.
 *
 * Norms, taps, embedding and merges are used where they lie in the file. Only the ternary weights
 * are unpacked, and the tokenizer gets its tables.
 */

// Control characters, perhaps of a file's name, become spaces.
static void one_line(char *text) {
    for (; *text; text++)
        if ((unsigned char)*text < ' ') *text = ' ';
}

// Say why a model cannot be used. Returns 0.
static int fail(bolt_model *m, const char *format, ...) {
    va_list arguments;
    va_start(arguments, format);
    vsnprintf(m->why, sizeof m->why, format, arguments);
    va_end(arguments);
    return 0;
}

// CRC-32, as zlib has it.
static uint32_t checksum(const uint8_t *data, size_t size) {
    // What each byte does to the bits behind it.
    uint32_t table[256];
    for (uint32_t n = 0; n < 256; n++) {
        uint32_t c = n;
        for (int k = 0; k < 8; k++) c = c >> 1 ^ (c & 1) * 0xEDB88320u;
        table[n] = c;
    }

    // From the first byte to the last.
    uint32_t c = ~0u;
    for (size_t n = 0; n < size; n++) c = table[(c ^ data[n]) & 255] ^ c >> 8;
    return ~c;
}

// NaN and infinity are the floats whose exponent has all bits set. Comparisons could not tell:
// -ffast-math takes it that there are none.
static int all_finite(const float *x, size_t count) {
    for (size_t n = 0; n < count; n++) {
        uint32_t bits;
        memcpy(&bits, x + n, sizeof bits);
        if ((bits & 0x7F800000) == 0x7F800000) return 0;
    }
    return 1;
}

static int map_file(bolt_model *m, const char *path) {
    // Without O_NONBLOCK, opening a pipe would wait for a writer.
    int file = open(path, O_RDONLY | O_NONBLOCK);
    struct stat status;
    if (file < 0) return fail(m, "%s", strerror(errno));

    // Then only a file that is long enough is looked into.
    if (fstat(file, &status)) {
        fail(m, "%s", strerror(errno));
    } else if (!S_ISREG(status.st_mode) || status.st_size < (off_t)sizeof(header)) {
        fail(m, "it is not a packed model");
    } else {
        // Pages are read when they are first looked at.
        m->size = (size_t)status.st_size;
        void *mapped = mmap(NULL, m->size, PROT_READ, MAP_PRIVATE, file, 0);
        if (mapped == MAP_FAILED) fail(m, "%s", strerror(errno));
        else m->file = mapped;
    }
    close(file);
    return m->file != NULL;
}

static int within(int32_t number, int32_t least, int32_t most) {
    return least <= number && number <= most;
}

// With sizes in these limits, none of the sums and products of them below overflows.
static int sizes_within_limits(const header *h) {
    return within(h->width, 1, MAX_WIDTH) &&
           within(h->blocks, 1, MAX_BLOCKS) &&
           within(h->hidden, 1, MAX_HIDDEN) &&
           within(h->sequence_length, 1, MAX_SEQUENCE) &&
           within(h->kernel_size, 1, MAX_KERNEL) &&
           within(h->vocabulary_size, MIN_VOCABULARY, MAX_VOCABULARY) &&
           within(h->heads, 1, MAX_HEADS) &&
           within(h->window, 1, MAX_WINDOW) &&
           within(h->layer_scale, 0, 1) &&
           within(h->encoding_bytes, MIN_ENCODING, MAX_ENCODING);
}

static int makes_sense(const header *h) {
    // The rest divides by these sizes.
    if (!sizes_within_limits(h)) return 0;

    // Channels come 16 at a time, also those of a head.
    int known_bits = h->embedding_bits == 8 || h->embedding_bits == 32;
    int whole_vectors = h->width % LANES == 0 && h->hidden % LANES == 0;
    int known_blocks = h->blocks == MAX_BLOCKS || h->attention >> h->blocks == 0;
    int whole_heads = h->width % (h->heads * LANES) == 0;
    int narrow_heads = h->width / h->heads <= MAX_HEAD_WIDTH;
    int heads_fit = !h->attention || (whole_heads && narrow_heads);
    return known_bits && whole_vectors && known_blocks && heads_fit;
}

static int read_header(bolt_model *m) {
    // First whether it is one of ours, then whether it is whole, then what it says.
    header *h = &m->header;
    memcpy(h, m->file, sizeof *h);
    if (memcmp(h->magic, "FLASHLM", 8)) return fail(m, "it is not a packed model");
    if (h->version != VERSION)
        return fail(m, "it is of version %u and this program reads version %d: export it anew",
                    h->version, VERSION);

    const size_t checked_from = offsetof(header, file_bytes);
    if (checksum(m->file + checked_from, sizeof *h - checked_from) != h->header_checksum)
        return fail(m, "its header is damaged");
    if (!makes_sense(h)) return fail(m, "its header makes no sense");

    // Rows and slots are taken 16 at a time.
    m->row = (int)round_up((size_t)h->vocabulary_size, LANES);
    m->slots = (int)round_up((size_t)h->window, LANES);
    return 1;
}

// The next section of the file, or NULL beyond its end; `taken` grows all the same.
static const void *take(bolt_model *m, uint64_t bytes) {
    uint64_t start = m->taken;
    m->taken += round_up(bytes, ALIGNMENT);
    if (m->taken > m->size) return NULL;
    return m->file + start;
}

// Channels that pass a block's convolution: the value, or query, key and value.
static uint64_t channels(const bolt_model *m, const block *b) {
    uint64_t D = m->header.width;
    return b->attends ? 3 * D : D;
}

static void find_block(bolt_model *m, block *b) {
    const uint64_t D = m->header.width;
    const uint64_t H = m->header.hidden;
    const uint64_t projected = channels(m, b) + D;
    b->mixer_norm = take(m, sizeof(float) * D);
    b->glu_norm = take(m, sizeof(float) * D);
    if (m->header.layer_scale) b->layer_scale = take(m, sizeof(float) * 2 * D);
    b->taps = take(m, sizeof(float) * m->header.kernel_size * channels(m, b));
    b->scales = take(m, sizeof(float) * 5);

    // Five ternary weights fit a byte, since 3^5 is 243.
    const uint64_t weights[5] = {projected * D, D * D, H * D, H * D, D * H};
    for (int n = 0; n < 5; n++) b->packed[n] = take(m, (weights[n] + 4) / 5);
}

// Find where each section starts, and check that they are all of the file. Nothing of them is read
// before that is known.
static int find_sections(bolt_model *m) {
    const header *h = &m->header;
    const uint64_t D = h->width;
    const uint64_t V = h->vocabulary_size;
    const uint64_t weights = D * m->row;
    m->blocks = calloc(h->blocks, sizeof(block));
    if (!m->blocks) return fail(m, "there is not enough memory");

    // In the order of packed.py.
    take(m, sizeof *h);
    for (int n = 0; n < h->blocks; n++) {
        m->blocks[n].attends = h->attention >> n & 1;
        find_block(m, &m->blocks[n]);
    }
    m->norm = take(m, sizeof(float) * D);
    if (h->embedding_bits == 8) {
        m->halves = take(m, sizeof(uint16_t) * V);
        m->embedding8 = take(m, weights);
    } else {
        m->embedding32 = take(m, sizeof(float) * weights);
    }
    m->tokenizer.kept = take(m, sizeof(uint16_t) * (V - SPECIALS));
    m->encoding = take(m, h->encoding_bytes);

    // Only a file of exactly this length is read on.
    if (m->size != h->file_bytes || m->size != m->taken || m->size > MAX_FILE_BYTES)
        return fail(m, "it is truncated, or longer than it should be");
    if (checksum(m->file + sizeof *h, m->size - sizeof *h) != h->content_checksum)
        return fail(m, "its content is damaged");
    return 1;
}

// A layer whose weights are all 0; `first` and `second` scale the halves of its rows.
static int allocate_layer(ternary *layer, int rows, int cols, float first, float second) {
    layer->rows = rows;
    layer->cols = cols;
    layer->groups = (cols + 2) / 3;
    layer->tiles = (int)round_up((size_t)rows, TILES * LANES) / LANES;
    layer->scale[0] = first;
    layer->scale[1] = second;
    layer->codes = calloc((size_t)layer->tiles * layer->groups, LANES);
    return layer->codes != NULL;
}

// Turn five weights per byte into codes of three, for `rows` rows from `from` on. Returns whether
// all of them are ternary.
static int unpack(ternary *layer, const uint8_t *packed, int from, int rows) {
    static const uint8_t places[5] = {1, 3, 9, 27, 81};
    size_t n = 0;
    for (int row = from; row < from + rows; row++)
        for (int group = 0; group < layer->groups; group++) {
            // The same digits as those of the table, see make_table(). Missing inputs count 0.
            int k = 0;
            int inputs = min_int(3, layer->cols - 3 * group);
            for (int input = 0; input < inputs; input++, n++) {
                if (packed[n / 5] >= 243) return 0;
                int weight = packed[n / 5] / places[n % 5] % 3 - 1;
                k += weight * places[input];
            }

            // Below zero comes the other half of the table.
            if (k < 0) k = NEGATIVE - k;
            layer->codes[code_index(layer, row, group)] = (uint8_t)k;
        }
    return 1;
}

// All floats of a block, which a damaged file could fill with anything.
static int finite_block(const bolt_model *m, const block *b) {
    const size_t D = m->header.width;
    return all_finite(b->mixer_norm, D) &&
           all_finite(b->glu_norm, D) &&
           (!b->layer_scale || all_finite(b->layer_scale, 2 * D)) &&
           all_finite(b->taps, m->header.kernel_size * channels(m, b)) &&
           all_finite(b->scales, 5);
}

static int open_blocks(bolt_model *m) {
    const int D = m->header.width;
    const int H = m->header.hidden;
    for (int n = 0; n < m->header.blocks; n++) {
        // The mixer projects to its channels and a gate.
        block *b = &m->blocks[n];
        const int projected = (int)channels(m, b) + D;
        const float *scales = b->scales;
        if (!finite_block(m, b)) return fail(m, "block %d is not finite", n);

        // Gate and up read the same inputs, so they become one layer with two scales.
        if (!allocate_layer(&b->in, projected, D, scales[0], scales[0]) ||
            !allocate_layer(&b->out, D, D, scales[1], scales[1]) ||
            !allocate_layer(&b->gate_up, 2 * H, D, scales[2], scales[3]) ||
            !allocate_layer(&b->down, D, H, scales[4], scales[4]))
            return fail(m, "there is not enough memory");

        if (!unpack(&b->in, b->packed[0], 0, projected) ||
            !unpack(&b->out, b->packed[1], 0, D) ||
            !unpack(&b->gate_up, b->packed[2], 0, H) ||
            !unpack(&b->gate_up, b->packed[3], H, H) ||
            !unpack(&b->down, b->packed[4], 0, D))
            return fail(m, "the weights of block %d are not ternary", n);

        // A convolution remembers its last K - 1 inputs, attention also keys and values.
        b->state = m->state_floats;
        m->state_floats += (m->header.kernel_size - 1) * channels(m, b);
        if (b->attends) m->state_floats += 2 * (size_t)m->slots * D;
        if (m->state_floats > MAX_STATE_FLOATS) return fail(m, "its state would be too large");
    }
    return 1;
}

static int open_embedding(bolt_model *m) {
    const size_t D = m->header.width;
    const int V = m->header.vocabulary_size;
    m->scales = calloc((size_t)m->row, sizeof(float));
    if (!m->scales) return fail(m, "there is not enough memory");

    // A bfloat16 is the upper half of a float.
    for (int id = 0; id < V && m->embedding8; id++) {
        uint32_t bits = (uint32_t)m->halves[id] << 16;
        memcpy(m->scales + id, &bits, sizeof bits);
    }

    // NaN and infinity would spread to everything.
    int finite = all_finite(m->norm, D) && all_finite(m->scales, V);
    if (m->embedding32) finite = finite && all_finite(m->embedding32, D * m->row);
    if (!finite) return fail(m, "its embedding is not finite");
    return 1;
}

// The bytes of a GPT-2 id; room for MAX_TOKEN_BYTES. Returns how many.
static int token_bytes(const tokenizer *words, uint32_t id, uint8_t *out) {
    // Take each merge apart, left part first, until only bytes are left.
    uint32_t stack[MAX_TOKEN_BYTES + 1];
    int depth = 0;
    int count = 0;
    stack[depth++] = id;
    while (depth) {
        uint32_t top = stack[--depth];
        if (top < BYTES) {
            out[count++] = words->byte_of[top];
        } else {
            const uint16_t *parts = words->merges + 2 * (top - BYTES);
            stack[depth++] = parts[1];
            stack[depth++] = parts[0];
        }
    }
    return count;
}

static int by_number(const void *a, const void *b) {
    uint64_t x = *(const uint64_t *)a;
    uint64_t y = *(const uint64_t *)b;
    return (x > y) - (x < y);
}

// Every byte must have one of GPT-2's first 256 ids.
static int open_bytes(tokenizer *words, const uint8_t *encoding) {
    int seen[BYTES] = {0};
    memcpy(words->byte_of, encoding, BYTES);
    for (int id = 0; id < BYTES; id++) {
        uint8_t byte = words->byte_of[id];
        if (seen[byte]++) return 0;
        words->id_of[byte] = (uint8_t)id;
        words->length[id] = 1;
    }
    return 1;
}

// Each merge must be of earlier ids, and what it makes must not be too long.
static int open_merges(tokenizer *words) {
    for (uint32_t n = 0; n < MERGES; n++) {
        uint32_t id = BYTES + n;
        uint32_t left = words->merges[2 * n];
        uint32_t right = words->merges[2 * n + 1];
        if (left >= id || right >= id) return 0;

        int length = words->length[left] + words->length[right];
        if (length > MAX_TOKEN_BYTES) return 0;
        words->length[id] = (uint16_t)length;
        words->pairs[n] = (uint64_t)left << 32 | right << 16 | n;
    }
    qsort(words->pairs, MERGES, sizeof *words->pairs, by_number);
    return 1;
}

// Each kept id must be one of GPT-2's, and only once; no single byte may be missing.
static int open_kept(tokenizer *words, int vocabulary) {
    for (int id = vocabulary - 1; id >= SPECIALS; id--) {
        uint8_t text[MAX_TOKEN_BYTES];
        uint32_t theirs = words->kept[id - SPECIALS];
        if (theirs >= GPT2_IDS || words->ours[theirs]) return 0;
        words->ours[theirs] = (uint16_t)id;

        // From the last id to the first, so that each list starts with its lowest.
        token_bytes(words, theirs, text);
        words->next[id] = words->first[text[0]];
        words->first[text[0]] = (uint16_t)id;
    }
    for (int id = 0; id < BYTES; id++)
        if (!words->ours[id]) return 0;
    return 1;
}

// Letters, digits, white space: each a count of ranges, and for each range a pair of numbers: how
// many code points to skip, and how many belong to it.
static int open_ranges(tokenizer *words, const uint8_t *at, const uint8_t *end) {
    for (int kind = 0; kind < LISTED_KINDS; kind++) {
        // No list may reach beyond the section.
        uint16_t count;
        if (end - at < 2) return 0;
        memcpy(&count, at, sizeof count);
        at += 2;
        if (end - at < 4 * count) return 0;

        // From differences to first and last code points.
        uint32_t *ranges = malloc(2 * sizeof(uint32_t) * (count + 1u));
        if (!ranges) return 0;
        words->ranges[kind] = ranges;
        words->counts[kind] = count;
        uint32_t code = 0;
        for (int n = 0; n < count; n++, at += 4) {
            uint16_t pair[2];
            memcpy(pair, at, sizeof pair);
            code += pair[0];
            ranges[2 * n] = code;
            code += pair[1];
            ranges[2 * n + 1] = code - 1;
        }
    }
    return at == end;
}

static int open_tokenizer(bolt_model *m) {
    tokenizer *words = &m->tokenizer;
    const int V = m->header.vocabulary_size;
    words->merges = (const uint16_t *)(m->encoding + BYTES);
    words->pairs = malloc(sizeof(uint64_t) * MERGES);
    words->length = malloc(sizeof(uint16_t) * GPT2_IDS);
    words->ours = calloc(GPT2_IDS, sizeof(uint16_t));
    words->next = malloc(sizeof(uint16_t) * V);
    if (!words->pairs || !words->length || !words->ours || !words->next)
        return fail(m, "there is not enough memory");

    // Each part relies on those before it.
    const uint8_t *end = m->encoding + m->header.encoding_bytes;
    if (!open_bytes(words, m->encoding) ||
        !open_merges(words) ||
        !open_kept(words, V) ||
        !open_ranges(words, m->encoding + MIN_ENCODING, end))
        return fail(m, "its vocabulary makes no sense");
    return 1;
}

// A model that was opened only in part can be closed, too.
void bolt_close(bolt_model *m) {
    if (!m) return;
    for (int n = 0; m->blocks && n < m->header.blocks; n++) {
        free(m->blocks[n].in.codes);
        free(m->blocks[n].out.codes);
        free(m->blocks[n].gate_up.codes);
        free(m->blocks[n].down.codes);
    }
    for (int kind = 0; kind < LISTED_KINDS; kind++) free(m->tokenizer.ranges[kind]);
    free(m->tokenizer.pairs);
    free(m->tokenizer.length);
    free(m->tokenizer.ours);
    free(m->tokenizer.next);
    free(m->blocks);
    free(m->scales);
    if (m->file) munmap((void *)m->file, m->size);
    free(m);
}

// Open a file: a model, or NULL and one line in `error`. The file must not change until the model
// is closed, since it is not copied.
bolt_model *bolt_open(const char *path, char *error, size_t room) {
    const char *why = "there is not enough memory";
    bolt_model *m = calloc(1, sizeof *m);
    if (m) {
        m->run = choose_kernels();
        if (map_file(m, path) && read_header(m) && find_sections(m) && open_blocks(m) &&
            open_embedding(m) && open_tokenizer(m))
            return m;
        why = m->why;
    }
    snprintf(error, room, "cannot use %s: %s", path, why);
    one_line(error);
    bolt_close(m);
    return NULL;
}

int bolt_vocabulary(const bolt_model *m) { return m->header.vocabulary_size; }

// Floats from one text's logits to the next one's.
int bolt_row(const bolt_model *m) { return m->row; }

const char *bolt_kernels(const bolt_model *m) { return m->run->name; }

// Zeros that start where a cache line does.
static float *new_floats(size_t count) {
    size_t bytes = round_up(sizeof(float) * count, ALIGNMENT);
    void *floats;
    if (posix_memalign(&floats, ALIGNMENT, bytes)) return NULL;
    return memset(floats, 0, bytes);
}

void bolt_end(bolt_state *s) {
    if (!s) return;
    free(s->memory);
    free(s->x);
    free(s->input);
    free(s->output);
    free(s->mixed);
    free(s->attention);
    free(s->distance);
    free(s->tables);
    free(s);
}

// Start 1 text, or 16 side by side; NULL without memory. All of them have read nothing.
bolt_state *bolt_start(const bolt_model *m, int texts) {
    if (texts != 1 && texts != LANES) return NULL;
    bolt_state *s = calloc(1, sizeof *s);
    if (!s) return NULL;
    const size_t B = texts;
    const size_t D = m->header.width;
    const size_t inputs = max_int(m->header.width, m->header.hidden);
    const size_t outputs = max_int(4 * m->header.width, 2 * m->header.hidden);
    const size_t groups = (inputs + 2) / 3;
    const size_t tables = B == 1 ? groups : GROUPS_AT_ONCE;

    // A layer reads whole groups of three inputs, and writes whole tiles of outputs.
    s->model = m;
    s->texts = texts;
    s->memory = calloc(m->state_floats * B + 1, sizeof(float));
    s->x = new_floats(D * B);
    s->input = new_floats(3 * groups * B);
    s->output = new_floats(round_up(outputs, TILES * LANES) * B);
    s->mixed = new_floats(3 * D * B);
    s->attention = new_floats(m->slots * B);
    s->distance = new_floats(m->slots * B);
    s->tables = new_floats(tables * TABLE * B);
    int good = s->memory && s->x && s->input && s->output && s->mixed;
    good = good && s->attention && s->distance && s->tables;
    if (good) return s;
    bolt_end(s);
    return NULL;
}

// Forget what a text has read.
void bolt_restart(bolt_state *s, int text) {
    s->start[text] = s->position;
    for (size_t n = 0; n < s->model->state_floats; n++) s->memory[n * s->texts + text] = 0;
}

// Read one id of each text. The logits of what follows go to (B, row), unless `logits` is NULL.
void bolt_step(bolt_state *s, const uint16_t *ids, float *logits) {
    s->model->run->step(s, ids, logits);
}

/* ---- text to ids --------------------------------------------------------------------------- */

/* As vocab.py does it, in three steps:
 *
 *     pieces    "Tom can't jump"      "Tom", " can", "'t", " jump"
 *     merges    the bytes of each piece, pair by pair, to ids of GPT-2
 *     cut       each of those as ours, or as several of ours if it was not kept
 *
 * Every text can be written, because every single byte is kept.
 */

// Bytes of the character that starts with `first`, or 0 if none does.
static int utf8_length(uint8_t first) {
    if (first < 0x80) return 1;
    if (first >> 5 == 0x06) return 2;
    if (first >> 4 == 0x0E) return 3;
    if (first >> 3 == 0x1E) return 4;
    return 0;
}

// The first character of a text; returns its bytes, or 0 if it is not UTF-8.
static int decode_utf8(const uint8_t *text, size_t size, uint32_t *code) {
    static const uint32_t least[5] = {0, 0, 0x80, 0x800, 0x10000};
    int length = utf8_length(text[0]);
    if (!length || (size_t)length > size) return 0;

    // The first byte holds the highest bits, each other one six more.
    *code = text[0];
    if (length > 1) *code &= 0x7Fu >> length;
    for (int n = 1; n < length; n++) {
        if (text[n] >> 6 != 2) return 0;
        *code = *code << 6 | (text[n] & 0x3F);
    }

    // What could be written shorter is not UTF-8, nor is half a character of UTF-16.
    int too_long = *code < least[length];
    int surrogate = *code >= 0xD800 && *code < 0xE000;
    if (too_long || surrogate || *code > 0x10FFFF) return 0;
    return length;
}

// Letter, digit, white space or other.
static int kind_of(const tokenizer *words, uint32_t code) {
    for (int kind = 0; kind < LISTED_KINDS; kind++) {
        // Find the first range that does not end before the character.
        const uint32_t *ranges = words->ranges[kind];
        int low = 0;
        int high = words->counts[kind];
        while (low < high) {
            int middle = (low + high) / 2;
            if (ranges[2 * middle + 1] < code) low = middle + 1;
            else high = middle;
        }
        if (low < words->counts[kind] && ranges[2 * low] <= code) return kind;
    }
    return OTHER;
}

// The end of the characters of one kind from `at` on; `last` becomes the start of the last one.
static size_t run_end(const tokenizer *words, const uint8_t *text, size_t at, size_t size, int kind,
                      size_t *last) {
    while (at < size) {
        uint32_t code;
        int length = decode_utf8(text + at, size - at, &code);
        if (kind_of(words, code) != kind) break;
        *last = at;
        at += (size_t)length;
    }
    return at;
}

// The end of the piece that GPT-2 encodes by itself: a contraction; a run of letters, digits or
// other signs, perhaps with a space in front; or white space.
static size_t piece_end(const tokenizer *words, const uint8_t *text, size_t at, size_t size) {
    static const char *const contractions[] = {"'s", "'d", "'m", "'t", "'ll", "'ve", "'re"};
    for (int n = 0; n < 7; n++) {
        size_t length = strlen(contractions[n]);
        if (size - at >= length && !memcmp(text + at, contractions[n], length)) return at + length;
    }

    // A space goes with what follows it.
    size_t start = at;
    if (text[at] == ' ' && at + 1 < size) start++;
    size_t last = at;
    uint32_t code;
    decode_utf8(text + start, size - start, &code);
    int kind = kind_of(words, code);
    size_t end = run_end(words, text, start, size, kind, &last);

    // The last white space before a word belongs to the word. But a piece is never empty, even if
    // a file says that a space is no white space.
    if (kind == SPACE && end < size && last > at) return last;
    return end;
}

// The id that a pair of ids merges to, or UINT32_MAX.
static uint32_t find_merge(const tokenizer *words, uint32_t left, uint32_t right) {
    // The pairs are sorted, and each holds its number in its lowest 16 bits.
    uint64_t key = (uint64_t)left << 32 | right << 16;
    size_t low = 0;
    size_t high = MERGES;
    while (low < high) {
        size_t middle = (low + high) / 2;
        if (words->pairs[middle] < key) low = middle + 1;
        else high = middle;
    }
    if (low == MERGES || words->pairs[low] >> 16 != key >> 16) return UINT32_MAX;
    return (uint32_t)(words->pairs[low] & 0xFFFF) + BYTES;
}

// What the n-th id and the one behind it merge to.
static uint32_t merge_at(const tokenizer *words, const uint32_t *ids, size_t n, size_t count) {
    if (n + 1 == count) return UINT32_MAX;
    return find_merge(words, ids[n], ids[n + 1]);
}

// Merge the bytes of a piece, always the pair that was learned first. ids: (count), becomes the
// ids; made: (count), what each merges to with the one behind it. Returns how many ids are left.
static size_t merge_piece(const tokenizer *words, const uint8_t *piece, size_t count, uint32_t *ids,
                          uint32_t *made) {
    // Start from single bytes.
    for (size_t n = 0; n < count; n++) ids[n] = words->id_of[piece[n]];
    for (size_t n = 0; n < count; n++) made[n] = merge_at(words, ids, n, count);
    for (;;) {
        // Ids of GPT-2 are numbered in the order in which their merges were learned.
        uint32_t earliest = UINT32_MAX;
        for (size_t n = 0; n < count; n++)
            if (made[n] < earliest) earliest = made[n];
        if (earliest == UINT32_MAX) return count;

        // What a merge makes is part of later merges only, so we merge all its places at once.
        size_t kept = 0;
        for (size_t n = 0; n < count; n++, kept++) {
            ids[kept] = ids[n];
            if (made[n] == earliest) {
                ids[kept] = earliest;
                n++;
            }
            made[kept] = made[n];
        }

        // Only the neighbours of what was made can merge to something new.
        count = kept;
        for (size_t n = 0; n < count; n++)
            if (ids[n] == earliest || (n + 1 < count && ids[n + 1] == earliest))
                made[n] = merge_at(words, ids, n, count);
    }
}

// Write a GPT-2 id in ours: as itself if it is kept, or else again and again as the longest kept
// piece that the rest of it starts with. Returns how many ids these are.
static size_t cut(const tokenizer *words, uint32_t id, uint16_t *out) {
    if (words->ours[id]) {
        out[0] = words->ours[id];
        return 1;
    }

    // Every byte is kept, so each round finds a piece.
    uint8_t text[MAX_TOKEN_BYTES];
    uint8_t piece[MAX_TOKEN_BYTES];
    int size = token_bytes(words, id, text);
    size_t count = 0;
    for (int at = 0, longest; at < size; at += longest, count++) {
        longest = 0;
        for (uint32_t ours = words->first[text[at]]; ours; ours = words->next[ours]) {
            uint32_t theirs = words->kept[ours - SPECIALS];
            int length = words->length[theirs];
            if (length <= longest || length > size - at) continue;

            token_bytes(words, theirs, piece);
            if (memcmp(piece, text + at, (size_t)length)) continue;
            longest = length;
            out[count] = (uint16_t)ours;
        }
    }
    return count;
}

// UTF-8 to ids, at most one per byte. Returns how many, -1 if the text is not UTF-8, -2 if there is
// not enough memory.
long bolt_encode(const bolt_model *m, const uint8_t *text, size_t size, uint16_t *ids) {
    // What follows relies on whole characters.
    const tokenizer *words = &m->tokenizer;
    for (size_t at = 0; at < size;) {
        uint32_t code;
        int length = decode_utf8(text + at, size - at, &code);
        if (!length) return -1;
        at += (size_t)length;
    }

    // Room for the ids of the longest piece, and for what they merge to.
    uint32_t *merged = malloc(2 * sizeof(uint32_t) * (size + 1));
    if (!merged) return -2;
    long count = 0;
    for (size_t at = 0; at < size;) {
        size_t end = piece_end(words, text, at, size);
        size_t left = merge_piece(words, text + at, end - at, merged, merged + size);
        for (size_t n = 0; n < left; n++) count += (long)cut(words, merged[n], ids + count);
        at = end;
    }
    free(merged);
    return count;
}

// The bytes of one of our ids; room for MAX_TOKEN_BYTES. Returns how many.
int bolt_token(const bolt_model *m, int id, uint8_t *text) {
    if (id < SPECIALS) return 0;
    return token_bytes(&m->tokenizer, m->tokenizer.kept[id - SPECIALS], text);
}

/* ---- scoring and generating ---------------------------------------------------------------- */

// -ln p of each id after the first, given all before it. nats: (length - 1). Returns 0, or -1
// without memory.
int bolt_score(bolt_state *s, const uint16_t *ids, long length, float *nats) {
    const bolt_model *m = s->model;
    float *logits = malloc(sizeof(float) * m->row);
    if (!logits) return -1;
    for (long n = 0; n + 1 < length; n++) {
        bolt_step(s, ids + n, logits);
        nats[n] = m->run->score(m, logits, ids[n + 1]);
    }
    free(logits);
    return 0;
}

// Told of each id of each story as it is written, EOS too. Anything but 0 ends the story.
typedef int bolt_listener(void *context, int story, int id);

// One of the B texts side by side.
typedef struct {
    int story;               // number of the story it writes, or -1
    const uint16_t *prompt;  // what it still has to read of its prompt
    long unread;             // ids of that
    uint64_t seed;
} place;

// Read the next id of a place's prompt into `next`, which otherwise holds the id it wrote last.
// Returns whether the place writes after it.
static int read_prompt(place *p, uint16_t *next) {
    if (p->story < 0) return 0;
    if (p->unread) {
        *next = *p->prompt++;
        p->unread--;
    }
    return !p->unread;
}

// Write on after `stories` prompts, each up to EOS or the most tokens, B at once; a place that is
// done takes the next story. Story n draws with seed + n, whatever is written beside it.
//
//     prompts, lengths        one prompt after another, each BOS first; their ids (stories)
//     ids, surprise, entropy  (stories, tokens): ids without EOS, and bits of each
//     counts, finished        (stories): ids written; whether EOS came
//     listener                may be NULL
//
// Returns 0, or -1 without memory. After how->stop, some stories have no counts.
int bolt_generate(bolt_state *s, int stories, const uint16_t *prompts, const long *lengths,
                  const bolt_settings *how, uint16_t *ids, float *surprise, float *entropy,
                  long *counts, int *finished, bolt_listener *listener, void *context) {
    const bolt_model *m = s->model;
    const int B = s->texts;
    const float bits_per_nat = 1.44269504f;
    float *logits = malloc(sizeof(float) * m->row * B);
    float *weights = malloc(sizeof(float) * m->row);
    candidate *found = malloc(sizeof(candidate) * (m->row + 1));
    sampler sampler = {.model = m, .how = how, .weights = weights, .found = found};
    int good = logits && weights && found;

    place places[LANES];
    uint16_t next[LANES] = {0};
    int begun = 0;
    int ended = 0;
    for (int t = 0; t < B; t++) places[t].story = -1;
    while (good && ended < stories && !(how->stop && *how->stop)) {
        // Each place that is free begins the next story, as long as there are any.
        for (int t = 0; t < B && begun < stories; t++) {
            if (places[t].story >= 0) continue;
            bolt_restart(s, t);
            places[t] = (place){begun, prompts, lengths[begun], how->seed + begun};
            prompts += lengths[begun];
            counts[begun++] = 0;
        }

        // All places read one id. While all are in their prompts, nobody needs logits.
        int writes[LANES];
        int wanted = 0;
        for (int t = 0; t < B; t++) {
            writes[t] = read_prompt(&places[t], &next[t]);
            wanted |= writes[t];
        }
        bolt_step(s, next, wanted ? logits : NULL);

        // Those that have read their prompts write one.
        for (int t = 0; t < B; t++) {
            if (!writes[t]) continue;
            const int n = places[t].story;
            int id = m->run->choose(&sampler, logits + (size_t)t * m->row, &places[t].seed);
            finished[n] = id == EOS;
            if (!finished[n]) {
                size_t at = (size_t)n * how->tokens + counts[n]++;
                next[t] = (uint16_t)id;
                ids[at] = (uint16_t)id;
                surprise[at] = sampler.surprise * bits_per_nat;
                entropy[at] = sampler.entropy * bits_per_nat;
            }

            // The place is free when its story has ended.
            int unwanted = listener && listener(context, n, id);
            if (finished[n] || unwanted || counts[n] == how->tokens) {
                places[t].story = -1;
                ended++;
            }
        }
    }
    free(logits);
    free(weights);
    free(found);
    return good ? 0 : -1;
}

/* ---- the program --------------------------------------------------------------------------- */

// bolt.py loads what is above as a library.
#ifndef BOLT_LIBRARY

// A bolt_listener: a story ends when nobody can read it.
static int print_token(void *model, int story, int id) {
    uint8_t text[MAX_TOKEN_BYTES];
    int length = bolt_token(model, id, text);
    (void)story;
    fwrite(text, 1, (size_t)length, stdout);
    return fflush(stdout) != 0;
}

// Say how the program is used. Returns its status.
static int usage(const char *complaint, const char *about) {
    char line[300];
    snprintf(line, sizeof line, "%s%.100s", complaint, about);
    one_line(line);
    fprintf(stderr,
            "error: %s (usage: bolt MODEL PROMPT [-n TOKENS] [-t TEMPERATURE] [-k TOP_K] "
            "[-p TOP_P] [-s SEED])\n",
            line);
    return 2;
}

// Set what a flag stands for; returns whether both can be used.
static int set(bolt_settings *how, const char *flag, const char *text) {
    char *end;
    double value = strtod(text, &end);
    if (end == text || *end || !(value >= 0 && value <= 1e9)) return 0;
    int whole = value == (double)(uint32_t)value;

    if (!strcmp(flag, "-n") && whole && value >= 1) how->tokens = (int)value;
    else if (!strcmp(flag, "-t")) how->temperature = (float)value;
    else if (!strcmp(flag, "-k") && whole) how->top_k = (int)value;
    else if (!strcmp(flag, "-p") && value > 0 && value <= 1) how->top_p = (float)value;
    else if (!strcmp(flag, "-s") && whole) how->seed = (uint64_t)value;
    else return 0;
    return 1;
}

// Print a prompt and what the model writes after it. Returns NULL, or what went wrong.
static const char *tell(bolt_model *m, const char *prompt, const bolt_settings *how) {
    // Room for an id per byte of the prompt, and for all that may be written.
    const size_t size = strlen(prompt);
    bolt_state *s = bolt_start(m, 1);
    uint16_t *read = malloc(sizeof(uint16_t) * (size + 1));
    uint16_t *written = malloc(sizeof(uint16_t) * how->tokens);
    float *bits = malloc(sizeof(float) * 2 * how->tokens);
    long length = -1;
    long count;
    int finished;
    const char *problem = "there is not enough memory";

    // BOS comes before the first word of every text.
    if (s && read && written && bits) {
        read[0] = BOS;
        length = 1 + bolt_encode(m, (const uint8_t *)prompt, size, read + 1);
    }
    if (length == 0) problem = "the prompt is not UTF-8: check the encoding of the terminal";
    if (length > 0) {
        fputs(prompt, stdout);
        if (!bolt_generate(s, 1, read, &length, how, written, bits, bits + how->tokens, &count,
                           &finished, print_token, m))
            problem = NULL;
        putchar('\n');
    }
    free(read);
    free(written);
    free(bits);
    bolt_end(s);
    return problem;
}

int main(int count, char **words) {
    // The same defaults as in Python.
    bolt_settings how = {.tokens = 200, .temperature = 0.8f, .top_p = 0.95f};
    if (count < 3) return usage("give a model and a prompt", "");
    for (int n = 3; n < count; n += 2)
        if (n + 1 == count || !set(&how, words[n], words[n + 1]))
            return usage("cannot be used: ", words[n]);
    if (!*words[2]) return usage("the prompt is empty", "");

    // An error has room for the longest path.
    char error[5000];
    const char *problem = error;
    bolt_model *m = bolt_open(words[1], error, sizeof error);
    if (m) problem = tell(m, words[2], &how);
    if (fflush(stdout)) {
        snprintf(error, sizeof error, "cannot write: %s", strerror(errno));
        problem = error;
    }
    bolt_close(m);
    if (!problem) return 0;
    fprintf(stderr, "error: %s\n", problem);
    return 2;
}
#endif
