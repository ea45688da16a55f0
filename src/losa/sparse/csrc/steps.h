// One token through a whole model, for any instruction set: a table of steps that all threads walk through together.
//
// The threads are woken once a token. A step is cut into pieces; a thread takes the next piece that nobody has (see take),
// and when there is none left it waits, spinning, until those taken are done. So nothing depends on how many threads there really are,
// and one that the system has put aside holds nobody up unless it holds a piece. Each row, head and group is the work of
// one piece: results do not depend on who does it.
//
// The source that includes this has defined, beside what product.h asks for,
//
//   FORM, place(x, n, to, scale)   of each kind: what the kind's x is (enum Form), and n <= GROUP columns of it from floats
//   Dense kinds                    with Value, Input, STEP, ABREAST, DENSE, Weights, Inputs, Sum, all, load, none, add, total, FORM, place
//   Kinds::call(matrix, body)      body(K()) with the kind K of a packed or a dense matrix
#pragma once
#include "product.h"

#include <sched.h>

namespace {

enum Does : int32_t { EMBED, NORM, PLACE, MULTIPLY, ADD, GATE, ATTEND };

struct Linear {
    Matrix weight;         // packed; or dense, if mask is null: rows of per_row entries
    const void *bias;      // [out] of bias_type, F32 or BF16; or null
    const void *x;         // in the form of the weight's kind, zero behind `in` up to a multiple of 64
    const float *scales;   // of x, if its form has them
    float *y;              // [out]
    Type bias_type;
};

struct Step {
    Does does;
    int32_t count;         // linears
    Linear linear[3];      // MULTIPLY, ADD: y = or += W x + bias. GATE: linear[0].y = silu(W0 x) W1 x. PLACE: the first's x
    float *x, *y;          // EMBED, ATTEND: y. NORM: y from x. PLACE: from x, floats
    const void *weight;    // NORM: [n] of `type`
    const void *table;     // EMBED: [vocabulary, n] of `type`
    int64_t n;
    Type type;
    float epsilon;         // NORM, and of q_norm and k_norm
    float *query, *key, *value;           // ATTEND: [heads, dim], [kv_heads, dim] twice; query and key are turned in place
    const void *query_norm, *key_norm;    // [dim] of `type`, or null
    int64_t heads, kv_heads, dim, window, layer;  // window: tokens seen, this one too; 0: all
    float scaling;
};

struct Counter {           // of a step's pieces: those to take, and how many are done; lines of their own
    Queues queues;
    alignas(64) int64_t done;
};
static_assert(sizeof(Counter) == 9 * 64, "losa.sparse.steps.COUNTER");

struct Plan {
    const Step *steps;
    Counter *counters;     // one a step, in memory that begins at a line
    int64_t count;
    int64_t token, slot;   // this token, and its place in the cache
    void *keys, *values;   // [layers, kv heads, capacity, dim] of cache_type, F32 or BF16
    int64_t layer_size, capacity;
    const float *cosines, *sines;  // [dim] of this token's position
    const uint8_t *visible;        // [slot + 1], whether a place is attended to; or null: all
    float *scores;         // [most heads, capacity]
    int32_t threads;
    Type cache_type;
};

constexpr int64_t PLACED = 4 * GROUP;  // columns a piece

// e^x to 2 units in the last place for x of at most 88; 0 below -87, as softmax and silu want it.
inline float exponential(float x) {
    x = x < -87 ? -87 : x > 88 ? 88 : x;
    const float n = (x * 1.44269504f + 12582912.0f) - 12582912.0f;  // to the nearest whole number
    const float r = (x - n * 0.693359375f) + n * 2.12194440e-4f;
    float e = 1.0f / 5040;
    e = e * r + 1.0f / 720;
    e = e * r + 1.0f / 120;
    e = e * r + 1.0f / 24;
    e = e * r + 1.0f / 6;
    e = e * r + 0.5f;
    e = e * r + 1;
    e = e * r + 1;
    return e * bits_float((uint32_t)((int32_t)n + 127) << 23);
}

inline float wide(float v) { return v; }
inline float wide(uint16_t v) { return bf16_float(v); }
inline void narrow(float v, float &to) { to = v; }
inline void narrow(float v, uint16_t &to) { to = float_bf16(v); }

template <class T>
inline float dot(const float *a, const T *b, int64_t n) {
    Vector s = zero(), t = zero();
    int64_t i = 0;
    for (; i + 2 * LANES <= n; i += 2 * LANES) {
        s = fma(load_floats(a + i), load_floats(b + i), s);
        t = fma(load_floats(a + i + LANES), load_floats(b + i + LANES), t);
    }
    for (; i + LANES <= n; i += LANES) s = fma(load_floats(a + i), load_floats(b + i), s);
    float rest = 0;
    for (; i < n; i++) rest += a[i] * wide(b[i]);
    return sum(fma(t, splat(1), s)) + rest;
}

inline void norm(const float *x, const void *weight, Type type, float epsilon, int64_t n, float *y) {
    const float by = 1 / __builtin_sqrtf(dot(x, x, n) / (float)n + epsilon);
    if (type == F32)
        for (int64_t i = 0; i < n; i++) y[i] = ((const float *)weight)[i] * (x[i] * by);
    else
        for (int64_t i = 0; i < n; i++) y[i] = wide(((const uint16_t *)weight)[i]) * (x[i] * by);
}

inline void turn(float *x, const Plan &plan, int64_t dim) {  // halves of a head as pairs, as transformers' rotate_half
    const int64_t half = dim / 2;
    for (int64_t i = 0; i < half; i++) {
        const float low = x[i], high = x[half + i];
        x[i] = low * plan.cosines[i] - high * plan.sines[i];
        x[half + i] = high * plan.cosines[half + i] + low * plan.sines[half + i];
    }
}

// y[j] = sum of p[i] rows[i][j] over rows of `dim`, count of them.
template <class T>
inline void weigh(const float *p, const T *rows, int64_t count, int64_t dim, float *y) {
    int64_t j = 0;
    for (; j + 4 * LANES <= dim; j += 4 * LANES) {
        Vector sums[4] = {zero(), zero(), zero(), zero()};
        for (int64_t i = 0; i < count; i++) {
            const Vector by = splat(p[i]);
            UNROLL(4)
            for (int k = 0; k < 4; k++) sums[k] = fma(by, load_floats(rows + i * dim + j + k * LANES), sums[k]);
        }
        for (int k = 0; k < 4; k++) store_floats(y + j + k * LANES, sums[k]);
    }
    for (; j + LANES <= dim; j += LANES) {
        Vector s = zero();
        for (int64_t i = 0; i < count; i++) s = fma(splat(p[i]), load_floats(rows + i * dim + j), s);
        store_floats(y + j, s);
    }
    for (; j < dim; j++) {
        float s = 0;
        for (int64_t i = 0; i < count; i++) s += p[i] * wide(rows[i * dim + j]);
        y[j] = s;
    }
}

// One key/value head with its query heads: turn them, keep key and value, attend.
template <class T>
void attend(const Plan &plan, const Step &s, int64_t head) {
    const int64_t dim = s.dim, group = s.heads / s.kv_heads;
    T *keys = (T *)plan.keys + s.layer * plan.layer_size + head * plan.capacity * dim;
    T *values = (T *)plan.values + s.layer * plan.layer_size + head * plan.capacity * dim;
    float *key = s.key + head * dim;
    const float *value = s.value + head * dim;
    if (s.key_norm) norm(key, s.key_norm, s.type, s.epsilon, dim, key);
    turn(key, plan, dim);
    for (int64_t i = 0; i < dim; i++) narrow(key[i], keys[plan.slot * dim + i]);
    for (int64_t i = 0; i < dim; i++) narrow(value[i], values[plan.slot * dim + i]);
    const int64_t first = s.window && plan.slot >= s.window ? plan.slot + 1 - s.window : 0;
    const int64_t count = plan.slot + 1 - first;
    for (int64_t h = head * group; h < (head + 1) * group; h++) {
        float *query = s.query + h * dim, *scores = plan.scores + h * plan.capacity;
        if (s.query_norm) norm(query, s.query_norm, s.type, s.epsilon, dim, query);
        turn(query, plan, dim);
        float most = -__builtin_inff();
        for (int64_t i = 0; i < count; i++) {
            const bool seen = !plan.visible || plan.visible[first + i];
            scores[i] = seen ? dot(query, keys + (first + i) * dim, dim) * s.scaling : -__builtin_inff();
            if (!(scores[i] <= most)) most = scores[i];  // NaN comes in
        }
        float total = 0;
        for (int64_t i = 0; i < count; i++) {
            scores[i] = scores[i] == -__builtin_inff() ? 0 : exponential(scores[i] - most);
            total += scores[i];
        }
        float *y = s.y + h * dim;
        weigh(scores, values + first * dim, count, dim, y);
        for (int64_t i = 0; i < dim; i++) y[i] /= total;
    }
}

// y[r] = row[r] of linear[r], times x.
template <class K, int R>
inline void rows_of(const Linear *const (&linear)[R], const int64_t (&row)[R], float (&y)[R]) {
    if constexpr (K::DENSE) {
        const typename K::Value *begin[R];
        for (int r = 0; r < R; r++) begin[r] = (const typename K::Value *)linear[r]->weight.values + row[r] * linear[r]->weight.per_row;
        dense_rows<K, R>(begin, (const typename K::Input *)linear[0]->x, linear[0]->weight.in, y);
    } else {
        Row<K> begin[R];
        for (int r = 0; r < R; r++) begin[r] = row_of<K>(linear[r]->weight, row[r]);
        const Layout x = {linear[0]->x, linear[0]->scales, 0, 0};
        float found[R][1];
        dot_rows<K, R, 1>(begin, linear[0]->weight.in, x, 0, found);
        for (int r = 0; r < R; r++) y[r] = found[r][0];
    }
    for (int r = 0; r < R; r++)
        if (linear[r]->bias) y[r] += read_float(linear[r]->bias, linear[r]->bias_type, row[r]);
}

// Pieces are counted in rows that are read together.
inline int64_t units_of(const Linear &l) {
    int64_t count = 0;
    Kinds::call(l.weight, [&](auto kind) { count = units(l.weight.out, decltype(kind)::ABREAST); });
    return count;
}

template <class K, int R>
inline void put(const Linear &l, bool adds, const int64_t (&row)[R]) {
    const Linear *from[R];
    for (int r = 0; r < R; r++) from[r] = &l;
    float y[R];
    rows_of<K, R>(from, row, y);
    for (int r = 0; r < R; r++) l.y[row[r]] = adds ? l.y[row[r]] + y[r] : y[r];
}

void multiply(const Linear &l, bool adds, int64_t begin, int64_t end) {
    Kinds::call(l.weight, [&](auto kind) {
        typedef decltype(kind) K;
        for (int64_t i = begin; i < end; i++)
            in_unit<K::ABREAST>(l.weight.out, i, [&](const auto &rows) { put<K>(l, adds, rows); });
    });
}

inline bool alike(const Matrix &a, const Matrix &b) {  // of one kind, so that one pass can read both
    return a.type == b.type && !a.mask == !b.mask && !a.sums == !b.sums;
}

inline float gated(float g, float up) { return g / (1 + exponential(-g)) * up; }

// Rows begin to end of a half of both weights; with those of the other half, where four are read together.
void gate(const Step &s, int64_t begin, int64_t end) {
    const Linear &a = s.linear[0], &b = s.linear[1];
    const int64_t half = (a.weight.out + 1) / 2;
    if (!alike(a.weight, b.weight)) {
        for (int64_t i = begin; i < end; i++) {
            for (int64_t row = i; row < a.weight.out; row += half) {
                float y[2][1] = {};
                Kinds::call(a.weight, [&](auto kind) { rows_of<decltype(kind), 1>({&a}, {row}, y[0]); });
                Kinds::call(b.weight, [&](auto kind) { rows_of<decltype(kind), 1>({&b}, {row}, y[1]); });
                a.y[row] = gated(y[0][0], y[1][0]);
            }
        }
        return;
    }
    Kinds::call(a.weight, [&](auto kind) {
        typedef decltype(kind) K;
        for (int64_t i = begin; i < end; i++) {
            if constexpr (K::ABREAST == 4) {
                if (half + i < a.weight.out) {
                    float y[4];
                    rows_of<K, 4>({&a, &b, &a, &b}, {i, i, half + i, half + i}, y);
                    a.y[i] = gated(y[0], y[1]), a.y[half + i] = gated(y[2], y[3]);
                    continue;
                }
            }
            for (int64_t row = i; row < a.weight.out; row += half) {
                float y[2];
                rows_of<K, 2>({&a, &b}, {row, row}, y);
                a.y[row] = gated(y[0], y[1]);
            }
        }
    });
}

inline void place(const Step &s, int64_t piece) {
    Kinds::call(s.linear[0].weight, [&](auto kind) {
        typedef decltype(kind) K;
        for (int64_t j = piece * PLACED; j < s.n && j < (piece + 1) * PLACED; j += GROUP) {
            const int64_t n = s.n - j < GROUP ? s.n - j : GROUP;
            // a group's inputs lie together, whatever their order within
            K::place(s.x + j, n, (typename K::Input *)s.linear[0].x + j * K::PER_COLUMN, (float *)s.linear[0].scales + j / GROUP);
        }
    });
}

// How many units of rows a thread takes at a time.
inline int64_t share(int64_t units, const Plan &plan) { return piece(units, plan.threads); }

inline int64_t pieces(const Plan &plan, const Step &s) {
    int64_t total = 0;
    switch (s.does) {
        case EMBED:
        case NORM: return 1;
        case PLACE: return (s.n + PLACED - 1) / PLACED;
        case ATTEND: return s.kv_heads;
        case GATE: {
            const int64_t rows = (s.linear[0].weight.out + 1) / 2;
            return (rows + share(rows, plan) - 1) / share(rows, plan);
        }
        case MULTIPLY:
        case ADD:
            for (int32_t i = 0; i < s.count; i++) {
                const int64_t rows = units_of(s.linear[i]);
                total += (rows + share(rows, plan) - 1) / share(rows, plan);
            }
    }
    return total;
}

void run(const Plan &plan, const Step &s, int64_t piece) {
    const auto part = [&](int64_t rows, auto &&body) {
        const int64_t size = share(rows, plan), begin = piece * size;
        body(begin, begin + size < rows ? begin + size : rows);
    };
    switch (s.does) {
        case EMBED:
            for (int64_t i = 0; i < s.n; i++) s.y[i] = read_float(s.table, s.type, plan.token * s.n + i);
            break;
        case NORM: norm(s.x, s.weight, s.type, s.epsilon, s.n, s.y); break;
        case PLACE: place(s, piece); break;
        case ATTEND:
            if (plan.cache_type == F32) attend<float>(plan, s, piece);
            else attend<uint16_t>(plan, s, piece);
            break;
        case GATE: part((s.linear[0].weight.out + 1) / 2, [&](int64_t begin, int64_t end) { gate(s, begin, end); }); break;
        case MULTIPLY:
        case ADD:
            for (int32_t i = 0; i < s.count; i++) {
                const Linear &l = s.linear[i];
                const int64_t rows = units_of(l), size = share(rows, plan), here = (rows + size - 1) / size;
                if (piece < here) {
                    part(rows, [&](int64_t begin, int64_t end) { multiply(l, s.does == ADD, begin, end); });
                    break;
                }
                piece -= here;
            }
    }
}

inline void relax() {
#if defined(__x86_64__)
    __builtin_ia32_pause();
#endif
}

// What each thread does; one that comes late finds its work done.
void walk(void *context, int64_t thread, int64_t) {
    const Plan &plan = *(const Plan *)context;
    for (int64_t i = 0; i < plan.count; i++) {
        Counter &counter = plan.counters[i];
        const int64_t count = pieces(plan, plan.steps[i]);
        int64_t mine = thread;
        for (int64_t piece; (piece = take(counter.queues, count, plan.threads, mine)) >= 0;) {
            run(plan, plan.steps[i], piece);
            __atomic_fetch_add(&counter.done, 1, __ATOMIC_RELEASE);
        }
        for (int64_t spins = 0; __atomic_load_n(&counter.done, __ATOMIC_ACQUIRE) < count; spins++) {
            if (spins < 4096) relax();
            else sched_yield();  // more threads than processors
        }
    }
}

int decode(Plan &plan) {
    memset((void *)plan.counters, 0, (size_t)plan.count * sizeof(Counter));
    losa_parallel(plan.threads, 1, plan.threads, walk, &plan);
    return 0;
}

}  // namespace

// The C functions of a source that has Kinds.
#define LOSA_DECODER(name)                                                                                              \
    extern "C" int losa_decode_##name(Plan *plan) { return decode(*plan); }                                             \
    extern "C" int losa_form_##name(const Matrix *weight) {                                                             \
        int32_t form = 0;                                                                                               \
        Kinds::call(*weight, [&](auto kind) { form = decltype(kind)::FORM; });                                          \
        return form;                                                                                                    \
    }
