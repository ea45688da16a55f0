// The masked low-rank linear in training, W' = M * (W + s B A) and the gradients of A and B from that of W', for any instruction
// set: what product.h asks of a Vector, and
//
//   Vector kept(v, bits)           v where bit i of the first LANES is set, 0 in the other lanes, whatever v has there
//   store_floats(to, v)            LANES bf16, too: to nearest, ties to even, NaN stays NaN
#pragma once
#include "losa.h"

namespace {

constexpr int FOUR = 4;        // rows at a time: each vector of A, and of its gradient, is loaded once for all
constexpr int64_t TILE = 512;  // columns at a time: those of A and its gradient stay in the nearest cache

// Vectors that reach beyond a row's end: n of their lanes are there.
template <class T>
inline Vector load_some(const T *from, int64_t n) {
    T all[LANES] = {};
    memcpy(all, from, (size_t)n * sizeof(T));
    return load_floats(all);
}

template <class T>
inline void store_some(T *to, Vector v, int64_t n) {
    T all[LANES];
    store_floats(all, v);
    memcpy(to, all, (size_t)n * sizeof(T));
}

// Four rows of something [out, in]; of fewer, the last one stands for those that are missing.
template <class T>
struct Rows {
    T *row[FOUR];
    Rows(T *data, int64_t stride, int64_t first, int64_t end) {
        for (int i = 0; i < FOUR; i++) row[i] = data + (first + i < end ? first + i : end - 1) * stride;
    }
};

// W' of four rows, columns [j, j + V LANES), or, if WHOLE is false, up to `in`.
template <int V, bool WHOLE, class W, class E>
inline void merge(const Pair &p, const Rows<const W> &w, const Rows<const uint8_t> &mask, const Rows<const float> &b, const Rows<E> &to, int64_t j) {
    Vector sum[FOUR][V];
    for (auto &row : sum)
        for (Vector &v : row) v = zero();
    for (int64_t r = 0; r < p.rank; r++) {
        Vector a[V];
        for (int k = 0; k < V; k++) a[k] = WHOLE ? load_floats(p.a + r * p.in + j + k * LANES) : load_some(p.a + r * p.in + j, p.in - j);
        for (int i = 0; i < FOUR; i++) {
            const Vector factor = splat(b.row[i][r]);
            for (int k = 0; k < V; k++) sum[i][k] = fma(factor, a[k], sum[i][k]);
        }
    }
    const Vector scaling = splat(p.scaling);
    for (int i = 0; i < FOUR; i++) {
        for (int k = 0; k < V; k++) {
            const int64_t at = j + k * LANES;
            const Vector merged = fma(scaling, sum[i][k], WHOLE ? load_floats(w.row[i] + at) : load_some(w.row[i] + at, p.in - at));
            const Vector masked = kept(merged, (unsigned)mask_word(mask.row[i], at / 8, (p.in + 7) / 8));
            if (WHOLE) store_floats(to.row[i] + at, masked);
            else store_some(to.row[i] + at, masked, p.in - at);
        }
    }
}

template <class W, class E>
void merge_range(void *context, int64_t begin, int64_t end) {
    const Pair &p = *(const Pair *)context;
    for (int64_t first = 0; first < p.in; first += TILE) {
        const int64_t last = first + TILE < p.in ? first + TILE : p.in;
        for (int64_t row = begin; row < end; row += FOUR) {
            const Rows<const W> w((const W *)p.weight, p.in, row, end);
            const Rows<const uint8_t> mask(p.mask, (p.in + 7) / 8, row, end);
            const Rows<const float> b(p.b, p.b_stride, row, end);
            const Rows<E> to((E *)p.effective, p.in, row, end);
            int64_t j = first;
            for (; j + 2 * LANES <= last; j += 2 * LANES) merge<2, true>(p, w, mask, b, to, j);
            for (; j + LANES <= last; j += LANES) merge<1, true>(p, w, mask, b, to, j);
            if (j < last) merge<1, false>(p, w, mask, b, to, j);
        }
    }
}

// dA += s B^T (M * G) and dB += s (M * G) A^T of up to four rows of G and columns [first, last), one row of A after the other.
template <class W>
inline void contract(const Pair &p, float *da, int64_t row, int64_t end, int64_t first, int64_t last) {
    const int64_t rows = end - row < FOUR ? end - row : FOUR;
    const int64_t vectors = (last - first + LANES - 1) / LANES, whole = (last - first) / LANES;
    float gradient[FOUR][TILE];
    for (int64_t i = 0; i < rows; i++) {
        const W *g = (const W *)p.weight + (row + i) * p.in + first;
        const uint8_t *mask = p.mask + (row + i) * ((p.in + 7) / 8);
        for (int64_t k = 0; k < vectors; k++) {
            const int64_t at = k * LANES;
            const Vector v = k < whole ? load_floats(g + at) : load_some(g + at, last - first - at);
            store_floats(gradient[i] + at, kept(v, (unsigned)mask_word(mask, (first + at) / 8, (p.in + 7) / 8)));
        }
    }
    for (int64_t i = rows; i < FOUR; i++) memset(gradient[i], 0, sizeof gradient[i]);
    for (int64_t r = 0; r < p.rank; r++) {
        const float *a = p.a + r * p.in + first;
        float *to = da + r * p.in + first;
        Vector dot[FOUR], factor[FOUR];
        for (int i = 0; i < FOUR; i++)
            dot[i] = zero(), factor[i] = splat(i < rows ? p.scaling * p.b[(row + i) * p.b_stride + r] : 0);
        for (int64_t k = 0; k < vectors; k++) {
            const int64_t at = k * LANES, n = last - first - at;
            const Vector input = k < whole ? load_floats(a + at) : load_some(a + at, n);
            Vector sum = k < whole ? load_floats(to + at) : load_some(to + at, n);
            for (int i = 0; i < FOUR; i++) {
                const Vector g = load_floats(gradient[i] + at);
                dot[i] = fma(g, input, dot[i]);
                sum = fma(g, factor[i], sum);
            }
            if (k < whole) store_floats(to + at, sum);
            else store_some(to + at, sum, n);
        }
        for (int64_t i = 0; i < rows; i++) p.db[(row + i) * p.rank + r] += p.scaling * ::sum(dot[i]);
    }
}

template <class W>
void contract_range(void *context, int64_t begin, int64_t end) {  // whole pieces, so that sums have one order whatever the threads
    const Pair &p = *(const Pair *)context;
    for (int64_t start = begin; start < end; start += p.piece) {
        const int64_t stop = start + p.piece < end ? start + p.piece : end;
        float *da = p.da + start / p.piece * p.rank * p.in;
        memset(da, 0, (size_t)(p.rank * p.in) * 4);
        memset(p.db + start * p.rank, 0, (size_t)((stop - start) * p.rank) * 4);
        for (int64_t first = 0; first < p.in; first += TILE) {
            const int64_t last = first + TILE < p.in ? first + TILE : p.in;
            for (int64_t row = start; row < stop; row += FOUR) contract<W>(p, da, row, stop, first, last);
        }
    }
}

inline void effective(const Pair &p) {
    void (*const made[2][2])(void *, int64_t, int64_t) = {{merge_range<float, float>, merge_range<float, uint16_t>},
                                                          {merge_range<uint16_t, float>, merge_range<uint16_t, uint16_t>}};
    losa_parallel(p.out, p.piece, p.threads, made[p.type == BF16][p.effective_type == BF16], (void *)&p);
}

inline void gradients(const Pair &p) {
    losa_parallel(p.out, p.piece, p.threads, p.type == BF16 ? contract_range<uint16_t> : contract_range<float>, (void *)&p);
}

}  // namespace

#define LOSA_PAIR(name)                                                                             \
    extern "C" int losa_effective_##name(const Pair *pair) { return effective(*pair), 0; }          \
    extern "C" int losa_gradients_##name(const Pair *pair) { return gradients(*pair), 0; }
