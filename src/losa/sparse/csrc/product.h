// The product with a packed weight, and its expansion, for any instruction set. The source that includes this has defined
//
//   Vector                       LANES floats; zero(), splat(f), fma(a, b, c) = a b + c, sum(Vector) -> float, mixed(a, b): any
//                                function of all their bits; load_floats(const float * or const uint16_t *), store_floats(to, v)
//
// and for each type of values a kind K with
//
//   Value, Input                 a stored value; an element of x as `arrange` lays it out, PER_COLUMN of them a column
//   STEP                         columns spread at a time: 8, 16, 32 or 64
//   SCALED                       whether each GROUP of columns has a scale
//   SUMMED                       whether `total` asks for the sum of a GROUP's values, which Matrix.sums then holds
//   ABREAST                      rows of the weight, 2 or 4, that are read together and share the loads of a single row of x;
//                                DENSE_ABREAST if it is dense
//   Mask mask(word, k)           the k-th STEP columns of 64
//   int count(Mask)              how many of them are kept
//   Weights spread(v, Mask)      the next values, each in its column, zero in the others
//   Inputs load(x)               STEP inputs
//   Sum none(), add(Sum&, Weights, Inputs), Vector total(Sum)
//   arrange(call, to, width, scales, groups)    lays out x; true if it wrote scales of x, one a GROUP
//   Output, put(Weights, scale, to)             for the expansion: an element of the tile; STEP of them
//
// Values beyond the last kept one of a mask are loaded (the tensor's padding has room for them) and never multiplied.
#pragma once
#include "losa.h"

#ifdef LOSA_NO_UNROLL
#define UNROLL(n)
#else
#define UNROLL(n) _Pragma(UNROLL_TEXT(GCC unroll n))
#define UNROLL_TEXT(text) #text
#endif

namespace {

// Of x: floats; of each 16 floats (AVX-512: 32) the even ones first; 16-bit fixed point with scales.
enum Form : int32_t { FLOATS, SPLIT, FIXED };

// Where column j is in the SPLIT form of groups of N.
template <int N>
inline int64_t split_place(int64_t j) {
    return j / N * N + j % 2 * (N / 2) + j % N / 2;
}

constexpr int TOGETHER = 4;  // rows of x that share one expansion; the next four read the weights from the nearest cache

struct Layout {  // x as the kernel reads it: [rows, width] of Input, zero behind the last column
    const void *data;
    const float *scales;  // [rows, groups]: only where x is quantised
    int64_t width, groups;
};

// Where a row of a packed weight begins.
template <class K>
struct Row {
    const typename K::Value *values;
    const uint8_t *mask;
    const uint16_t *scales;  // of its GROUPs, if K has scales
    const int16_t *sums;     // of the values of its GROUPs, if K asks for them
};

template <class K>
inline Row<K> row_of(const Matrix &w, int64_t row) {
    const int64_t groups = (w.in + GROUP - 1) / GROUP;
    return {(const typename K::Value *)w.values + first_value(w, row), w.mask + row * ((w.in + 7) / 8),
            K::SCALED ? w.scales + row * groups : nullptr, K::SUMMED ? w.sums + row * groups : nullptr};
}

// The line that a stream comes to soon. Processors' own prefetchers stop where a page ends, and values' addresses hang on the
// counts before them: with this a core of a Xeon with AVX-512 reads 1.5 times as many packed weights from memory.
enum Ahead : uintptr_t { OF_MASK = 512, OF_VALUES = 3072 };  // bytes, in about the same time

template <Ahead AHEAD>
inline void fetch(const void *at) {
    __builtin_prefetch((const void *)((uintptr_t)at + AHEAD));
}

// y[r][b] = rows of packed weights, of one matrix or several of `in` columns, times rows of x from first_x on.
template <class K, int R, int B>
inline void dot_rows(const Row<K> (&row)[R], int64_t in, const Layout &x, int64_t first_x, float (&y)[R][B]) {
    const int64_t bytes = (in + 7) / 8;
    constexpr int STEPS = 64 / K::STEP;
    // A sum waits for the last one of its own chain: with few sums, two chains each, unless they are pairs already.
    constexpr int CHAINS = B == 1 && STEPS > 1 && sizeof(typename K::Sum) == sizeof(Vector) ? 2 : 1;
    typename K::Sum sums[R][B][CHAINS];
    Vector totals[R][B];
    UNROLL(4)
    for (int r = 0; r < R; r++) {
        for (int b = 0; b < B; b++) {
            totals[r][b] = zero();
            for (int c = 0; c < CHAINS; c++) sums[r][b][c] = K::none();
        }
    }
    // Four rows leave few registers: a pointer passes over the values then, and words of the mask are loaded for each use. With fewer
    // it is an index: moving a pointer takes a cycle more on Zen 2, and a fifth of the speed. (asm: else compilers choose.)
    constexpr bool POINTERS = R > 2;
    const typename K::Value *values[R];
    int64_t at[R] = {};
    UNROLL(4)
    for (int r = 0; r < R; r++) values[r] = row[r].values;
    constexpr int PER_LINE = 128 / (int)sizeof(typename K::Value);  // columns, of which half or less are kept
    const typename K::Input *inputs[B];
    for (int b = 0; b < B; b++) inputs[b] = (const typename K::Input *)x.data + (first_x + b) * x.width;

    const auto step = [&](int64_t byte, const uint8_t *const(&bits)[R]) __attribute__((always_inline)) {
        uint64_t word[R];
        UNROLL(8)
        for (int k = 0; k < STEPS; k++) {
            typename K::Weights weights[R];
            UNROLL(4)
            for (int r = 0; r < R; r++) {
                if (POINTERS || k == 0) memcpy(&word[r], bits[r], 8);
                if (POINTERS) asm("" : "+r"(word[r]));  // else it is kept in a register for masks, and moved back to be counted
                const typename K::Mask kept = K::mask(word[r], k);
                if (k * K::STEP % PER_LINE == 0) fetch<OF_VALUES>(values[r] + at[r]);
                weights[r] = K::spread(values[r] + at[r], kept);
                if constexpr (POINTERS) {
                    values[r] += K::count(kept);
                    asm("" : "+r"(values[r]));
                } else {
                    at[r] += K::count(kept);
                    asm("" : "+r"(at[r]));
                }
            }
            UNROLL(8)
            for (int b = 0; b < B; b++) {
                const typename K::Inputs in = K::load(inputs[b] + (byte * 8 + k * K::STEP) * K::PER_COLUMN);
                UNROLL(4)
                for (int r = 0; r < R; r++) K::add(sums[r][b][k % CHAINS], weights[r], in);
            }
        }
    };
    const int64_t span = K::SCALED ? GROUP / 8 : bytes;  // bytes of the mask between two uses of the sums
    for (int64_t begin = 0; begin < bytes; begin += span) {
        const int64_t end = begin + span < bytes ? begin + span : bytes;
        int64_t byte = begin;
        const uint8_t *bits[R];
        for (; byte + 8 <= end; byte += 8) {
            UNROLL(4)
            for (int r = 0; r < R; r++) bits[r] = row[r].mask + byte;
            if (byte % 64 == 0) {
                UNROLL(4)
                for (int r = 0; r < R; r++) fetch<OF_MASK>(bits[r]);
            }
            step(byte, bits);
        }
        if (byte < end) {  // the row's last columns: nothing is read beyond it
            uint8_t last[R][8] = {};
            UNROLL(4)
            for (int r = 0; r < R; r++) memcpy(last[r], row[r].mask + byte, (size_t)(end - byte)), bits[r] = last[r];
            step(byte, bits);
        }
        if (K::SCALED) {
            UNROLL(4)
            for (int r = 0; r < R; r++) {
                const float scale = bf16_float(row[r].scales[begin / span]);
                for (int b = 0; b < B; b++) {
                    const float both = x.scales ? scale * x.scales[(first_x + b) * x.groups + begin / span] : scale;
                    for (int c = 0; c < CHAINS; c++) {
                        Vector part;
                        if constexpr (K::SUMMED) part = K::total(sums[r][b][c], row[r].sums[begin / span]);
                        else part = K::total(sums[r][b][c]);
                        totals[r][b] = fma(part, splat(both), totals[r][b]);
                        sums[r][b][c] = K::none();
                    }
                }
            }
        }
    }
    UNROLL(4)
    for (int r = 0; r < R; r++) {
        for (int b = 0; b < B; b++) {
            if constexpr (!K::SCALED)
                for (int c = 0; c < CHAINS; c++) totals[r][b] = fma(K::total(sums[r][b][c]), splat(1), totals[r][b]);
            y[r][b] = sum(totals[r][b]);
        }
    }
}

template <class K, int B, int R>
inline void product_rows(const Call &call, const Layout &x, int64_t first_x, const int64_t (&row)[R]) {
    Row<K> rows[R];
    for (int r = 0; r < R; r++) rows[r] = row_of<K>(call.weight, row[r]);
    float found[R][B];
    dot_rows<K, R, B>(rows, call.weight.in, x, first_x, found);
    for (int r = 0; r < R; r++) {
        for (int b = 0; b < B; b++) {
            if (first_x + b >= call.rows) break;  // x was filled up to B rows
            const float y = found[r][b] + (call.bias ? read_float(call.bias, call.bias_type, row[r]) : 0);
            const int64_t at = (first_x + b) * call.weight.out + row[r];
            if (call.x_type == F32) ((float *)call.y)[at] = y;
            else ((uint16_t *)call.y)[at] = float_bf16(y);
        }
    }
}

struct Work {
    const Call *call;
    const Layout *x;
};

// Units of rows that are read together; the last ones, if they do not come out even, are one more, read one by one. The rows of a
// unit are as far apart as can be: each reads on where its last one ended, which the processor's prefetchers follow, and they
// follow two such streams better far apart (AVX2, 4096 columns: 32 rows apart 10, 128 and more 14 weights a nanosecond).
inline int64_t units(int64_t rows, int64_t abreast) { return (rows + abreast - 1) / abreast; }

// body(rows) with the ABREAST rows of a matrix of `out` that are its unit i; of the last one, with each row alone.
template <int ABREAST, class Body>
inline void in_unit(int64_t out, int64_t i, Body body) {
    const int64_t apart = out / ABREAST;
    if (i < apart) {
        int64_t rows[ABREAST];
        for (int r = 0; r < ABREAST; r++) rows[r] = r * apart + i;
        body(rows);
    } else {
        for (int64_t row = ABREAST * apart; row < out; row++) {
            const int64_t alone[1] = {row};
            body(alone);
        }
    }
}

// How many of them with so many rows of x; sums of more would not all fit into registers.
template <class K>
constexpr int abreast(int64_t of_x) {
    return of_x == 1 ? K::ABREAST : 2;
}

template <class K, int B>
void product_range(void *context, int64_t begin, int64_t end) {
    const Work &work = *(const Work *)context;
    for (int64_t i = begin; i < end; i++)
        for (int64_t b = 0; b < work.call->rows; b += B)
            in_unit<abreast<K>(B)>(work.call->weight.out, i, [&](const auto &rows) { product_rows<K, B>(*work.call, *work.x, b, rows); });
}

// How many units a thread takes at a time: few enough that all have work, which comes out even.
inline int64_t piece(int64_t units, int32_t threads) {
    const int64_t fair = units / (4 * (threads > 0 ? threads : 1));
    return fair < 1 ? 1 : fair > 32 ? 32 : fair;
}

// 0, or 1 if there is no memory for x.
template <class K>
int product(const Call &call) {
    const int64_t together = call.rows < TOGETHER ? call.rows : TOGETHER;
    const int64_t rows = round_up(call.rows, together);
    const int64_t width = round_up(call.weight.in, 64) * K::PER_COLUMN;
    const int64_t groups = (call.weight.in + GROUP - 1) / GROUP;
    const int64_t data = round_up(rows * width * (int64_t)sizeof(typename K::Input), 64);
    char *memory = (char *)aligned_alloc(64, (size_t)(data + round_up(rows * groups * 4, 64)));
    if (!memory) return 1;
    memset(memory, 0, (size_t)data);
    float *scales = (float *)(memory + data);
    const bool scaled = K::arrange(call, (typename K::Input *)memory, width, scales, groups);
    const Layout x = {memory, scaled ? scales : nullptr, width, groups};
    Work work = {&call, &x};
    const auto body = together == 1   ? product_range<K, 1>
                      : together == 2 ? product_range<K, 2>
                      : together == 3 ? product_range<K, 3>
                                      : product_range<K, TOGETHER>;
    const int64_t count = units(call.weight.out, abreast<K>(together));
    losa_parallel(count, piece(count, call.threads), call.threads, body, &work);
    free(memory);
    return 0;
}

// x as floats.
inline void arrange_floats(const Call &call, float *to, int64_t width) {
    for (int64_t b = 0; b < call.rows; b++)
        for (int64_t j = 0; j < call.weight.in; j++)
            to[b * width + j] = read_float(call.x, call.x_type, b * call.weight.in + j);
}

struct Expansion {
    const Matrix *weight;
    int64_t first;   // row of the weight that goes to the first row of the tile
    void *tile;      // [rows, stride], stride a multiple of 64
    int64_t stride;
};

template <class K>
void expand_range(void *context, int64_t begin, int64_t end) {
    const Expansion &e = *(const Expansion *)context;
    const Matrix &w = *e.weight;
    const int64_t bytes = (w.in + 7) / 8, groups = (w.in + GROUP - 1) / GROUP;
    for (int64_t i = begin; i < end; i++) {
        const int64_t row = e.first + i;
        const typename K::Value *values = (const typename K::Value *)w.values + first_value(w, row);
        typename K::Output *to = (typename K::Output *)e.tile + i * e.stride;
        for (int64_t byte = 0; byte < bytes; byte += 8) {
            const uint64_t word = mask_word(w.mask + row * bytes, byte, bytes);
            const float scale = K::SCALED ? bf16_float(w.scales[row * groups + byte * 8 / GROUP]) : 1;
UNROLL(8)
            for (int k = 0; k < 64 / K::STEP; k++) {
                const typename K::Mask kept = K::mask(word, k);
                K::put(K::spread(values, kept), scale, to + byte * 8 + k * K::STEP);
                values += K::count(kept);
            }
        }
    }
}

template <class K>
int expand(const Matrix &weight, int64_t first, int64_t rows, void *tile, int64_t stride, int32_t threads) {
    Expansion e = {&weight, first, tile, stride};
    losa_parallel(rows, 16, threads, expand_range<K>, &e);
    return 0;
}

// y[r] = rows of `in` entries of a dense weight times x, zero behind the last column up to a multiple of 64.
template <class K, int R>
inline void dense_rows(const typename K::Value *const (&row)[R], const typename K::Input *x, int64_t in, float (&y)[R]) {
    constexpr int CHAINS = R == DENSE_ABREAST ? 2 : 4;
    constexpr int PER_LINE = 64 / (int)sizeof(typename K::Value);
    typename K::Sum sums[R][CHAINS];
    for (int r = 0; r < R; r++)
        for (int c = 0; c < CHAINS; c++) sums[r][c] = K::none();
    const auto step = [&](const typename K::Value *const (&from)[R], int64_t at, int64_t j) __attribute__((always_inline)) {
        UNROLL(8)
        for (int k = 0; k < 64 / K::STEP; k++) {
            const typename K::Inputs inputs = K::load(x + j + k * K::STEP);
            UNROLL(4)
            for (int r = 0; r < R; r++) {
                if (k * K::STEP % PER_LINE == 0) fetch<OF_VALUES>(from[r] + at + k * K::STEP);
                K::add(sums[r][k % CHAINS], K::all(from[r] + at + k * K::STEP), inputs);
            }
        }
    };
    int64_t j = 0;
    for (; j + 64 <= in; j += 64) step(row, j, j);
    if (j < in) {  // the rows' last columns: nothing is read beyond them
        typename K::Value last[R][64] = {};
        const typename K::Value *from[R];
        for (int r = 0; r < R; r++) memcpy(last[r], row[r] + j, (size_t)(in - j) * sizeof *row[r]), from[r] = last[r];
        step(from, 0, j);
    }
    for (int r = 0; r < R; r++) {
        Vector total = zero();
        for (int c = 0; c < CHAINS; c++) total = fma(K::total(sums[r][c]), splat(1), total);
        y[r] = sum(total);
    }
}

// Opponents in benchmarks. A dense bf16 weight [out, in], `in` a multiple of 64, and one row of x; y in float.
struct Dense {
    const uint16_t *weight;
    const void *x;
    float *y;
    int64_t out, in;
};

template <class K>
void dense_range(void *context, int64_t begin, int64_t end) {
    const Dense &d = *(const Dense *)context;
    const typename K::Input *x = (const typename K::Input *)d.x;
    for (int64_t i = begin; i < end; i++) {
        in_unit<K::ABREAST>(d.out, i, [&](const auto &rows) {
            constexpr int R = sizeof rows / sizeof *rows;
            float y[R];
            const uint16_t *from[R];
            for (int r = 0; r < R; r++) from[r] = d.weight + rows[r] * d.in;
            dense_rows<K, R>(from, x, d.in, y);
            for (int r = 0; r < R; r++) d.y[rows[r]] = y[r];
        });
    }
}

template <class K>
int dense(const uint16_t *weight, const float *x, float *y, int64_t out, int64_t in, int32_t threads) {
    typename K::Input *placed = (typename K::Input *)aligned_alloc(64, (size_t)in * sizeof(typename K::Input));
    if (!placed) return 1;
    for (int64_t j = 0; j < in; j += GROUP) K::place(x + j, in - j < GROUP ? in - j : GROUP, placed + j, nullptr);
    Dense d = {weight, placed, y, out, in};
    const int64_t count = units(out, K::ABREAST);
    losa_parallel(count, piece(count, threads), threads, dense_range<K>, &d);
    free(placed);
    return 0;
}

struct Reading {
    const char *data;
    int64_t apart;  // lines from one stream to the next
    uint64_t sum;
};

template <int STREAMS>
void read_range(void *context, int64_t begin, int64_t end) {
    Reading &reading = *(Reading *)context;
    constexpr int STEPS = 16 / LANES;
    Vector sums[STREAMS][STEPS];
    for (int s = 0; s < STREAMS; s++)
        for (int k = 0; k < STEPS; k++) sums[s][k] = zero();
    for (int64_t line = begin; line < end; line++) {
        UNROLL(4)
        for (int s = 0; s < STREAMS; s++) {
            const float *from = (const float *)(reading.data + (s * reading.apart + line) * 64);
            fetch<OF_VALUES>(from);
            UNROLL(2)
            for (int k = 0; k < STEPS; k++) sums[s][k] = mixed(sums[s][k], load_floats(from + k * LANES));
        }
    }
    uint64_t sum = 0, parts[LANES / 2];
    for (int s = 0; s < STREAMS; s++) {
        for (int k = 0; k < STEPS; k++) {
            store_floats((float *)parts, sums[s][k]);
            for (uint64_t part : parts) sum ^= part;
        }
    }
    __atomic_fetch_xor(&reading.sum, sum, __ATOMIC_RELAXED);
}

// Reads so many lines of 64 bytes once, in 1, 2 or 4 streams (up to 3 lines at the end are left out): `sum` of what was read.
inline uint64_t read(const void *data, int64_t lines, int32_t streams, int32_t threads) {
    Reading reading = {(const char *)data, lines / streams, 0};
    const auto body = streams == 4 ? read_range<4> : streams == 2 ? read_range<2> : read_range<1>;
    losa_parallel(reading.apart, 4096 / streams, threads, body, &reading);
    return reading.sum;
}

}  // namespace

// The C functions of a source that defines KindBF16, KindF16, KindF32 and KindI8, all with floats for x.
#define LOSA_KERNEL(name)                                                                                               \
    extern "C" int losa_multiply_##name(const Call *call) {                                                             \
        switch (call->weight.type) {                                                                                    \
            case BF16: return product<KindBF16>(*call);                                                                 \
            case F16: return product<KindF16>(*call);                                                                   \
            case F32: return product<KindF32>(*call);                                                                   \
            case I8: return product<KindI8>(*call);                                                                     \
        }                                                                                                               \
        return 2;                                                                                                       \
    }                                                                                                                   \
    extern "C" int losa_expand_##name(const Matrix *weight, int64_t first, int64_t rows, void *tile, int64_t stride,    \
                                      int32_t threads) {                                                                \
        switch (weight->type) {                                                                                         \
            case BF16: return expand<KindBF16>(*weight, first, rows, tile, stride, threads);                            \
            case F16: return expand<KindF16>(*weight, first, rows, tile, stride, threads);                              \
            case F32: return expand<KindF32>(*weight, first, rows, tile, stride, threads);                              \
            case I8: return expand<KindI8>(*weight, first, rows, tile, stride, threads);                                \
        }                                                                                                               \
        return 2;                                                                                                       \
    }

#define LOSA_OPPONENTS(name)                                                                                            \
    extern "C" int losa_dense_##name(const uint16_t *weight, const float *x, float *y, int64_t out, int64_t in,         \
                                     int32_t threads) {                                                                 \
        return dense<DenseBF16>(weight, x, y, out, in, threads);                                                        \
    }                                                                                                                   \
    extern "C" uint64_t losa_read_##name(const void *data, int64_t lines, int32_t streams, int32_t threads) {           \
        return read(data, lines, streams, threads);                                                                     \
    }
