// AVX-512 with VBMI2, BF16 and VNNI: 32 columns of bfloat16 or 64 of int8 at a time, expanded as they are stored and multiplied
// without becoming floats.
#include "losa.h"
#include "vector512.h"

#include "product.h"

namespace {

struct KindBF16 {  // x is bfloat16 too
    typedef uint16_t Value, Input;
    typedef __mmask32 Mask;
    typedef __m512i Weights, Inputs;
    typedef __m512 Sum;
    static constexpr int STEP = 32, PER_COLUMN = 1;
    static constexpr bool SCALED = false;
    static Mask mask(uint64_t word, int k) { return (Mask)(word >> 32 * k); }
    static int count(Mask mask) { return __builtin_popcount(mask); }
    static Weights all(const uint16_t *v) { return _mm512_loadu_si512(v); }
    static Weights spread(const uint16_t *v, Mask mask) { return _mm512_maskz_expand_epi16(mask, all(v)); }
    static Inputs load(const uint16_t *x) { return hold(_mm512_loadu_si512(x)); }
    static Sum none() { return zero(); }
    static void add(Sum &sum, Weights w, Inputs x) { sum = _mm512_dpbf16_ps(sum, (__m512bh)w, (__m512bh)x); }
    static Vector total(Sum sum) { return sum; }
    static bool arrange(const Call &call, uint16_t *to, int64_t width, float *, int64_t) {
        const int64_t in = call.weight.in;
        for (int64_t b = 0; b < call.rows; b++) memcpy(to + b * width, (const uint16_t *)call.x + b * in, (size_t)in * 2);
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
    static constexpr int STEP = 64, PER_COLUMN = 2;
    static constexpr bool SCALED = true;
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
    static bool arrange(const Call &call, uint8_t *to, int64_t width, float *scales, int64_t groups) {
        const int64_t in = call.weight.in;
        for (int64_t b = 0; b < call.rows; b++) {
            for (int64_t g = 0; g < groups; g++) {
                const int64_t begin = g * GROUP, end = begin + GROUP < in ? begin + GROUP : in;
                float largest = 0;
                for (int64_t j = begin; j < end; j++) {
                    const float x = __builtin_fabsf(read_float(call.x, call.x_type, b * in + j));
                    if (!(x <= largest)) largest = x;  // NaN comes in; a number after it does not, since it is not above
                    if (largest != largest) break;
                }
                const float scale = largest / 32767;
                const bool usable = scale >= 0x1p-126f && scale <= 0x1p127f;  // not NaN, infinite or about zero
                scales[b * groups + g] = usable ? scale : largest <= 1 ? 0 : bits_float(0x7fc00000);
                const float inverse = usable ? 1 / scale : 0;
                for (int64_t j = begin; j < end; j++) {
                    const float x = usable ? read_float(call.x, call.x_type, b * in + j) * inverse : 0;
                    const int32_t digits = (int32_t)__builtin_rintf(x) + 32768;
                    uint8_t *at = to + b * width + j / 64 * 128 + j % 64;
                    at[0] = (uint8_t)(digits >> 8);
                    at[64] = (uint8_t)digits;
                }
            }
        }
        return true;
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

extern "C" int losa_multiply_avx512_bf16(const Call *call) {
    return call->weight.type == I8 ? product<KindI8>(*call) : product<KindBF16>(*call);
}

extern "C" int losa_expand_avx512_bf16_bf16(const Matrix *weight, int64_t first, int64_t rows, void *tile, int64_t stride, int32_t threads) {
    return weight->type == I8 ? expand<ExpandI8>(*weight, first, rows, tile, stride, threads)
                              : expand<KindBF16>(*weight, first, rows, tile, stride, threads);
}

extern "C" int losa_dense_avx512_bf16(const uint16_t *weight, const void *x, float *y, int64_t out, int64_t in, int32_t threads) {
    Dense dense = {weight, x, y, in};
    losa_parallel(out, 64, threads, dense_range<KindBF16>, &dense);
    return 0;
}
