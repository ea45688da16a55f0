// AVX-512 with VBMI2, BF16 and VNNI: 32 columns of bfloat16 or 64 of int8 at a time, expanded as they are stored.
#include "losa.h"
#include "vector512.h"

#include "product.h"

namespace {

// A pair of columns is a word: shifted it is the even one as a float, masked the odd one. vdpbf16ps, which multiplies both at once,
// takes the port that expansion needs (Xeon: 5.4 cycles for 32 columns, 4.6 so), and x would have to be rounded for it.
struct KindBF16 {
    typedef uint16_t Value;
    typedef float Input;
    typedef __mmask32 Mask;
    typedef __m512i Weights;
    struct Inputs {
        __m512 even, odd;
    };
    struct Sum {
        __m512 even, odd;
    };
    static constexpr int STEP = 32, PER_COLUMN = 1, ABREAST = 4;
    static constexpr bool SCALED = false, SUMMED = false, DENSE = false;
    static constexpr Form FORM = SPLIT;
    static Mask mask(uint64_t word, int k) { return (Mask)(word >> 32 * k); }
    static int count(Mask mask) { return __builtin_popcount(mask); }
    static Weights all(const uint16_t *v) { return _mm512_loadu_si512(v); }
    static Weights spread(const uint16_t *v, Mask mask) { return _mm512_maskz_expand_epi16(mask, all(v)); }
    static Inputs load(const float *x) { return {hold(_mm512_loadu_ps(x)), hold(_mm512_loadu_ps(x + 16))}; }
    static Sum none() { return {zero(), zero()}; }
    static void add(Sum &sum, Weights w, Inputs x) {
        sum.even = fma(_mm512_castsi512_ps(_mm512_slli_epi32(w, 16)), x.even, sum.even);
        sum.odd = fma(_mm512_castsi512_ps(_mm512_and_si512(w, _mm512_set1_epi32((int)0xffff0000))), x.odd, sum.odd);
    }
    static Vector total(Sum sum) { return fma(sum.even, splat(1), sum.odd); }
    static void place(const float *x, int64_t n, float *to, float *) {
        for (int64_t j = 0; j < n; j++) to[split_place<STEP>(j)] = x[j];
    }
    static bool arrange(const Call &call, float *to, int64_t width, float *, int64_t) {
        const int64_t in = call.weight.in;
        for (int64_t b = 0; b < call.rows; b++)
            for (int64_t j = 0; j < in; j++)
                to[b * width + split_place<STEP>(j)] = read_float(call.x, call.x_type, b * in + j);
        return false;
    }
    typedef uint16_t Output;
    static void put(Weights w, float, uint16_t *to) { _mm512_storeu_si512(to, w); }
};

// x of a GROUP of columns as scale * (256 (high - 128) + low), two bytes without sign: 16 bits relative to the group's
// largest, more than bfloat16 has. Products with int8 are summed exactly, in integers of 32 bits, over the group.
struct KindI8 {
    typedef int8_t Value;
    typedef uint8_t Input;  // of every 64 columns: 64 high bytes, 64 low bytes
    typedef __mmask64 Mask;
    typedef __m512i Weights;
    struct Inputs {
        __m512i high, low;
    };
    struct Sum {
        __m512i high, low, weights;
    };
    static constexpr int STEP = 64, PER_COLUMN = 2, ABREAST = 4;
    static constexpr bool SCALED = true, SUMMED = false, DENSE = false;
    static constexpr Form FORM = FIXED;
    static Mask mask(uint64_t word, int) { return word; }
    static int count(Mask mask) { return __builtin_popcountll(mask); }
    static Weights spread(const int8_t *v, Mask mask) { return _mm512_maskz_expand_epi8(mask, _mm512_loadu_si512(v)); }
    static Inputs load(const uint8_t *x) { return {hold(_mm512_loadu_si512(x)), hold(_mm512_loadu_si512(x + 64))}; }
    static Sum none() { return {_mm512_setzero_si512(), _mm512_setzero_si512(), _mm512_setzero_si512()}; }
    static void add(Sum &sum, Weights w, Inputs x) {
        sum.high = _mm512_dpbusd_epi32(sum.high, x.high, w);
        sum.low = _mm512_dpbusd_epi32(sum.low, x.low, w);
        sum.weights = _mm512_dpbusd_epi32(sum.weights, _mm512_set1_epi8(1), w);
    }
    static Vector total(Sum sum) {  // each below 2^28: 16 products a lane
        const __m512i high = _mm512_sub_epi32(_mm512_slli_epi32(sum.high, 8), _mm512_slli_epi32(sum.weights, 15));
        return _mm512_cvtepi32_ps(_mm512_add_epi32(high, sum.low));
    }
    // A GROUP of x, or what there is of it, and its scale.
    static void place(const float *x, int64_t n, uint8_t *to, float *scale) {
        float most[16] = {};
        bool number = true;
        for (int64_t j = 0; j < n; j++) {
            const float size = __builtin_fabsf(x[j]);
            most[j % 16] = size > most[j % 16] ? size : most[j % 16];
            number &= size == size;
        }
        float largest = number ? 0 : bits_float(0x7fc00000);
        for (float size : most) largest = size > largest ? size : largest;
        const float unit = largest / 32767;
        const bool usable = unit >= 0x1p-126f && unit <= 0x1p127f;  // not NaN, infinite or about zero
        *scale = usable ? unit : largest <= 1 ? 0 : bits_float(0x7fc00000);
        const float inverse = usable ? 1 / unit : 0;
        for (int64_t begin = 0; begin < n; begin += 64) {
            const int64_t end = begin + 64 < n ? 64 : n - begin;
            for (int64_t j = 0; j < end; j++) {
                const int32_t digits = (int32_t)__builtin_rintf(usable ? x[begin + j] * inverse : 0) + 32768;
                to[2 * begin + j] = (uint8_t)(digits >> 8);
                to[2 * begin + 64 + j] = (uint8_t)digits;
            }
        }
    }
    static bool arrange(const Call &call, uint8_t *to, int64_t width, float *scales, int64_t groups) {
        const int64_t in = call.weight.in;
        float x[GROUP];
        for (int64_t b = 0; b < call.rows; b++) {
            for (int64_t begin = 0; begin < in; begin += GROUP) {
                const int64_t n = begin + GROUP < in ? GROUP : in - begin;
                for (int64_t j = 0; j < n; j++) x[j] = read_float(call.x, call.x_type, b * in + begin + j);
                place(x, n, to + b * width + 2 * begin, scales + b * groups + begin / GROUP);
            }
        }
        return true;
    }
};

// Where the sums of the weights are known, two products do.
struct KindI8Summed : KindI8 {
    static constexpr bool SUMMED = true;
    struct Sum {
        __m512i high, low;
    };
    static Sum none() { return {_mm512_setzero_si512(), _mm512_setzero_si512()}; }
    static void add(Sum &sum, Weights w, Inputs x) {
        sum.high = _mm512_dpbusd_epi32(sum.high, x.high, w);
        sum.low = _mm512_dpbusd_epi32(sum.low, x.low, w);
    }
    static Vector total(Sum sum, int32_t weights) {  // 2^15 of them each, a sixteenth in every lane
        const __m512i both = _mm512_add_epi32(_mm512_slli_epi32(sum.high, 8), sum.low);
        return _mm512_cvtepi32_ps(_mm512_sub_epi32(both, _mm512_set1_epi32(weights * 2048)));
    }
};

typedef Whole<KindBF16> DenseBF16;

struct DenseF32 {
    typedef float Value, Input;
    typedef __m512 Weights, Inputs, Sum;
    static constexpr int STEP = 16, PER_COLUMN = 1, ABREAST = DENSE_ABREAST;
    static constexpr bool DENSE = true;
    static constexpr Form FORM = FLOATS;
    static Weights all(const float *v) { return _mm512_loadu_ps(v); }
    static Inputs load(const float *x) { return hold(_mm512_loadu_ps(x)); }
    static Sum none() { return zero(); }
    static void add(Sum &sum, Weights w, Inputs x) { sum = fma(w, x, sum); }
    static Vector total(Sum sum) { return sum; }
    static void place(const float *x, int64_t n, float *to, float *) { memcpy(to, x, (size_t)n * 4); }
};

struct Kinds {
    template <class Body>
    static void call(const Matrix &w, Body body) {  // of what the kernel does not refuse
        if (!w.mask) return w.type == BF16 ? body(DenseBF16()) : body(DenseF32());
        if (w.type == BF16) return body(KindBF16());
        return w.sums ? body(KindI8Summed()) : body(KindI8());
    }
};

struct ExpandI8 {  // rounded to bfloat16 once multiplied by its scale
    typedef int8_t Value;
    typedef uint16_t Output;
    typedef __mmask16 Mask;
    typedef __m512 Weights;
    static constexpr int STEP = 16;
    static constexpr bool SCALED = true;
    static Mask mask(uint64_t word, int k) { return (Mask)(word >> 16 * k); }
    static int count(Mask mask) { return __builtin_popcount(mask); }
    static Weights spread(const int8_t *v, Mask mask) {
        return _mm512_maskz_expand_ps(mask, i8_floats(_mm_loadu_si128((const __m128i *)v)));
    }
    static void put(Weights w, float scale, uint16_t *to) {
        const __m256bh rounded = _mm512_cvtneps_pbh(_mm512_mul_ps(w, splat(scale)));
        _mm256_storeu_si256((__m256i *)to, (__m256i)rounded);
    }
};

}  // namespace

#include "steps.h"

LOSA_DECODER(avx512_bf16)
LOSA_OPPONENTS(avx512_bf16)

extern "C" int losa_multiply_avx512_bf16(const Call *call) {
    return call->weight.type == I8 ? product<KindI8>(*call) : product<KindBF16>(*call);
}

extern "C" int losa_expand_avx512_bf16(const Matrix *weight, int64_t first, int64_t rows, void *tile, int64_t stride, int32_t threads) {
    return weight->type == I8 ? expand<ExpandI8>(*weight, first, rows, tile, stride, threads)
                              : expand<KindBF16>(*weight, first, rows, tile, stride, threads);
}
