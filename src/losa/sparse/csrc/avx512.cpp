// AVX-512 (F, BW, VL, DQ): sixteen columns at a time. The next values become floats, and the mask, as a register of its own
// kind, expands them to their columns.
#include "losa.h"
#include "vector512.h"

#include "product.h"

namespace {

struct Floats {
    typedef float Input, Output;
    typedef __mmask16 Mask;
    typedef __m512 Weights, Inputs, Sum;
    static constexpr int STEP = 16, PER_COLUMN = 1, ABREAST = 2;
    static constexpr bool SCALED = false, SUMMED = false, DENSE = false;
    static constexpr Form FORM = FLOATS;
    static Mask mask(uint64_t word, int k) { return (Mask)(word >> 16 * k); }
    static int count(Mask mask) { return __builtin_popcount(mask); }
    static Inputs load(const float *x) { return hold(_mm512_loadu_ps(x)); }
    static Sum none() { return zero(); }
    static void add(Sum &sum, Weights w, Inputs x) { sum = fma(w, x, sum); }
    static Vector total(Sum sum) { return sum; }
    static bool arrange(const Call &call, float *to, int64_t width, float *, int64_t) {
        arrange_floats(call, to, width);
        return false;
    }
    static void place(const float *x, int64_t n, float *to, float *) { memcpy(to, x, (size_t)n * 4); }
    static void put(Weights w, float, float *to) { _mm512_storeu_ps(to, w); }
};

struct KindBF16 : Floats {
    typedef uint16_t Value;
    static Weights all(const uint16_t *v) { return bf16_floats(_mm256_loadu_si256((const __m256i *)v)); }
    static Weights spread(const uint16_t *v, Mask mask) { return _mm512_maskz_expand_ps(mask, all(v)); }
};

struct KindF16 : Floats {
    typedef uint16_t Value;
    static Weights spread(const uint16_t *v, Mask mask) {
        return _mm512_maskz_expand_ps(mask, _mm512_cvtph_ps(_mm256_loadu_si256((const __m256i *)v)));
    }
};

struct KindF32 : Floats {
    typedef float Value;
    static Weights spread(const float *v, Mask mask) { return _mm512_maskz_expand_ps(mask, _mm512_loadu_ps(v)); }
    static Weights all(const float *v) { return _mm512_loadu_ps(v); }
};

struct KindI8 : Floats {
    typedef int8_t Value;
    static constexpr bool SCALED = true;
    static Weights spread(const int8_t *v, Mask mask) {
        return _mm512_maskz_expand_ps(mask, i8_floats(_mm_loadu_si128((const __m128i *)v)));
    }
    static void put(Weights w, float scale, float *to) { _mm512_storeu_ps(to, _mm512_mul_ps(w, splat(scale))); }
};

typedef Whole<KindBF16> DenseBF16;
typedef Whole<KindF32> DenseF32;
typedef KindsByType<KindBF16, KindF16, KindF32, KindI8, DenseBF16, DenseF32> Kinds;

}  // namespace

#include "pair.h"
#include "steps.h"

LOSA_KERNEL(avx512)
LOSA_DECODER(avx512)
LOSA_OPPONENTS(avx512)
LOSA_PAIR(avx512)
