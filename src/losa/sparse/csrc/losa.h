// What the sources share: the C interface, plain conversions, threads.
//
// Each instruction set's source is compiled with its own -m flags. A function that two of them emit under one name would be
// merged by the linker into either one's code, and crash where the processor lacks it: so everything shared here and in
// product.h has internal linkage, and no inline function of the standard library is used.
#pragma once
#include <stddef.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

enum Type : int32_t { F32, BF16, F16, I8 };

struct Matrix {            // a packed weight [out, in], as docs/format.md has it
    const void *values;    // of `type`, with 64 entries behind the last
    const uint8_t *mask;   // [out, ceil(in / 8)]
    const int32_t *offsets;  // [out + 1], or null: every row then keeps per_row
    const uint16_t *scales;  // bf16 [out, ceil(in / 256)] if the type is I8
    const int16_t *sums;     // of the values that share a scale, [out, ceil(in / 256)]: for decoding, or null
    int64_t out, in, per_row;
    Type type;
};

constexpr int DENSE_ABREAST = 4;  // rows of a dense weight that are read together: two streams fetch a fifth less, one a third

// A kind of packed values, of a weight that keeps all of them in rows.
template <class Kind>
struct Whole : Kind {
    static constexpr bool DENSE = true;
    static constexpr int ABREAST = DENSE_ABREAST;
};

// The kind that a matrix is of, where its type decides that: packed bf16, fp16, fp32, int8, or dense bf16, fp32.
template <class Brain, class Half, class Single, class Scaled, class DenseBrain, class DenseSingle>
struct KindsByType {
    template <class Body>
    static void call(const Matrix &w, Body body) {
        if (!w.mask) return w.type == BF16 ? body(DenseBrain()) : body(DenseSingle());
        switch (w.type) {
            case BF16: return body(Brain());
            case F16: return body(Half());
            case F32: return body(Single());
            case I8: return body(Scaled());
        }
    }
};

struct Call {              // y [rows, out] = x [rows, in] W^T + bias
    Matrix weight;
    const void *x;         // x_type: F32 or BF16, rows contiguous
    const void *bias;      // [out], bias_type: F32 or BF16; or null
    void *y;               // of x_type
    int64_t rows;
    Type x_type, bias_type;
    int32_t threads;
};

// A masked low-rank linear in training: what it multiplies by, W' = M * (W + s B A), and the gradients of A and B.
struct Pair {
    const void *weight;    // [out, in] of `type`, F32 or BF16, rows contiguous: W, or the gradient of W'
    const uint8_t *mask;   // [out, ceil(in / 8)]
    const float *a, *b;    // [rank, in] contiguous; [out, rank], rows b_stride apart
    void *effective;       // W' [out, in] of effective_type, F32 or BF16
    float *da, *db;        // [ceil(out / piece), rank, in], to be summed over its pieces of `piece` rows; [out, rank]
    int64_t out, in, rank, b_stride, piece;
    float scaling;
    Type type, effective_type;
    int32_t threads;
};

constexpr int MOST_QUEUES = 8;

// Pieces of a work that are still to be taken, zero when it begins: a queue of neighbours for each thread, or for a few.
struct Queues {
    struct {
        alignas(64) int64_t taken;
    } queue[MOST_QUEUES];
};

// body(context, begin, end) over the whole of [0, count), in pieces of `step`, each piece once, by up to `threads` threads.
extern "C" void losa_parallel(int64_t count, int64_t step, int32_t threads, void (*body)(void *, int64_t, int64_t), void *context);

namespace {

constexpr int GROUP = 256;  // columns that share a scale

inline float bits_float(uint32_t bits) {
    float value;
    memcpy(&value, &bits, 4);
    return value;
}

inline float bf16_float(uint16_t bits) { return bits_float((uint32_t)bits << 16); }

inline uint16_t float_bf16(float value) {  // to nearest, ties to even; NaN stays NaN
    uint32_t bits;
    memcpy(&bits, &value, 4);
    if ((bits & 0x7fffffff) > 0x7f800000) return (uint16_t)(bits >> 16 | 0x40);
    return (uint16_t)((bits + 0x7fff + (bits >> 16 & 1)) >> 16);
}

inline float read_float(const void *data, Type type, int64_t i) {
    return type == F32 ? ((const float *)data)[i] : bf16_float(((const uint16_t *)data)[i]);
}

inline int64_t first_value(const Matrix &w, int64_t row) { return w.offsets ? w.offsets[row] : row * w.per_row; }

// The next of `count` pieces for a thread whose queue is `mine`, or -1: its own first, so that it reads on where it was;
// then from the others', whose threads are slower or were put aside by the system.
inline int64_t take(Queues &queues, int64_t count, int32_t threads, int64_t &mine) {
    const int64_t many = threads < MOST_QUEUES ? threads : MOST_QUEUES;
    for (int64_t tried = 0; tried < many; tried++, mine++) {
        mine %= many;
        const int64_t begin = mine * count / many, end = (mine + 1) * count / many;
        int64_t &taken = queues.queue[mine].taken;
        if (begin + __atomic_load_n(&taken, __ATOMIC_RELAXED) >= end) continue;
        const int64_t piece = begin + __atomic_fetch_add(&taken, 1, __ATOMIC_RELAXED);
        if (piece < end) return piece;
    }
    return -1;
}

inline int64_t round_up(int64_t n, int64_t to) { return (n + to - 1) / to * to; }

// 64 columns of a row's mask. The last word of a row may have fewer bytes; the bits it lacks are 0: nothing is read
// beyond the row.
inline uint64_t mask_word(const uint8_t *mask, int64_t byte, int64_t bytes) {
    uint64_t word = 0;
    if (byte + 8 <= bytes) memcpy(&word, mask + byte, 8);
    else memcpy(&word, mask + byte, (size_t)(bytes - byte));
    return word;
}

}  // namespace
