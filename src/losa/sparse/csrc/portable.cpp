// Plain C++ for any processor: eight columns at a time, lanes in an array that compilers turn into what vectors there are.
#include "losa.h"

namespace {

struct Vector {
    float lane[8];
};

inline Vector splat(float f) {
    Vector v;
    for (float &lane : v.lane) lane = f;
    return v;
}
inline Vector zero() { return splat(0); }
inline Vector fma(const Vector &a, const Vector &b, const Vector &c) {
    Vector v;
    for (int i = 0; i < 8; i++) v.lane[i] = a.lane[i] * b.lane[i] + c.lane[i];
    return v;
}
inline float sum(const Vector &v) {
    const float *f = v.lane;
    return ((f[0] + f[4]) + (f[2] + f[6])) + ((f[1] + f[5]) + (f[3] + f[7]));
}
inline Vector mixed(const Vector &a, const Vector &b) {
    Vector v;
    uint32_t bits[2][8];
    memcpy(bits[0], a.lane, 32), memcpy(bits[1], b.lane, 32);
    for (int i = 0; i < 8; i++) bits[0][i] ^= bits[1][i];
    memcpy(v.lane, bits[0], 32);
    return v;
}

constexpr int LANES = 8;
inline Vector load_floats(const float *from) {
    Vector v;
    memcpy(v.lane, from, sizeof v.lane);
    return v;
}
inline Vector load_floats(const uint16_t *from) {
    Vector v;
    for (int i = 0; i < LANES; i++) v.lane[i] = bf16_float(from[i]);
    return v;
}
inline void store_floats(float *to, const Vector &v) { memcpy(to, v.lane, sizeof v.lane); }

}  // namespace

#define LOSA_NO_UNROLL  // of lanes in arrays: compilers take long over it
#include "product.h"

namespace {

struct Numbers {  // for every mask byte: which of the next values each column has; 8 if none
    uint8_t entry[256][8];
    constexpr Numbers() : entry() {
        for (int mask = 0; mask < 256; mask++)
            for (int c = 0, value = 0; c < 8; c++) entry[mask][c] = mask >> c & 1 ? (uint8_t)value++ : 8;
    }
};
constexpr Numbers NUMBERS;

inline float to_float(float v) { return v; }
inline float to_float(int8_t v) { return v; }
inline float half_float(uint16_t h) {
    const uint32_t sign = (uint32_t)(h & 0x8000) << 16, rest = h & 0x7fff;
    if (rest >= 0x7c00) return bits_float(sign | 0x7f800000 | rest << 13);                        // infinity, NaN
    const float value = rest < 0x400 ? (float)rest * 0x1p-24f : bits_float((rest << 13) + 0x38000000);  // subnormal or not
    return sign ? -value : value;
}

struct Floats {
    typedef float Input, Output;
    typedef unsigned Mask;
    typedef Vector Weights, Inputs, Sum;
    static constexpr int STEP = 8, PER_COLUMN = 1, ABREAST = 2;
    static constexpr bool SCALED = false, SUMMED = false, DENSE = false;
    static constexpr Form FORM = FLOATS;
    static Mask mask(uint64_t word, int k) { return word >> 8 * k & 255; }
    static int count(Mask mask) { return __builtin_popcount(mask); }
    static Inputs load(const float *x) {
        Vector v;
        memcpy(v.lane, x, sizeof v.lane);
        return v;
    }
    static Sum none() { return zero(); }
    static void add(Sum &sum, const Weights &w, const Inputs &x) { sum = fma(w, x, sum); }
    static Vector total(const Sum &sum) { return sum; }
    static bool arrange(const Call &call, float *to, int64_t width, float *, int64_t) {
        arrange_floats(call, to, width);
        return false;
    }
    static void place(const float *x, int64_t n, float *to, float *) { memcpy(to, x, (size_t)n * 4); }
    static void put(const Weights &w, float scale, float *to) {
        for (int i = 0; i < 8; i++) to[i] = w.lane[i] * scale;
    }
};

template <class T, float (*CONVERT)(T), bool WITH_SCALES = false>
struct Kind : Floats {
    typedef T Value;
    static constexpr bool SCALED = WITH_SCALES;
    static Weights spread(const T *v, Mask mask) {
        float next[9];
        for (int i = 0; i < 8; i++) next[i] = CONVERT(v[i]);
        next[8] = 0;
        Vector w;
        for (int i = 0; i < 8; i++) w.lane[i] = next[NUMBERS.entry[mask][i]];
        return w;
    }
    static Weights all(const T *v) {
        Vector w;
        for (int i = 0; i < 8; i++) w.lane[i] = CONVERT(v[i]);
        return w;
    }
};

typedef Kind<uint16_t, bf16_float> KindBF16;
typedef Kind<uint16_t, half_float> KindF16;
typedef Kind<float, to_float> KindF32;
typedef Kind<int8_t, to_float, true> KindI8;

typedef Whole<KindBF16> DenseBF16;
typedef Whole<KindF32> DenseF32;
typedef KindsByType<KindBF16, KindF16, KindF32, KindI8, DenseBF16, DenseF32> Kinds;

}  // namespace

#include "steps.h"

LOSA_KERNEL(portable)
LOSA_DECODER(portable)
LOSA_OPPONENTS(portable)
