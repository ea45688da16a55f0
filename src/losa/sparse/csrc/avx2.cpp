// AVX2 with FMA, F16C and BMI2. Eight columns at a time: a byte of the mask looks up the shuffle that moves the next values to
// their columns. The look-up tables have 32 bytes an entry, so that a shifted mask byte is the offset of its entry.
#include "losa.h"

#include <immintrin.h>

namespace {

typedef __m256 Vector;

inline Vector zero() { return _mm256_setzero_ps(); }
inline Vector splat(float f) { return _mm256_set1_ps(f); }
inline Vector fma(Vector a, Vector b, Vector c) { return _mm256_fmadd_ps(a, b, c); }

inline float sum(Vector v) {
    __m128 s = _mm_add_ps(_mm256_castps256_ps128(v), _mm256_extractf128_ps(v, 1));
    s = _mm_add_ps(s, _mm_movehl_ps(s, s));
    return _mm_cvtss_f32(_mm_add_ss(s, _mm_movehdup_ps(s)));
}

inline Vector mixed(Vector a, Vector b) { return _mm256_xor_ps(a, b); }

constexpr int LANES = 8;
inline Vector load_floats(const float *from) { return _mm256_loadu_ps(from); }
inline Vector load_floats(const uint16_t *from) {
    return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(_mm_loadu_si128((const __m128i *)from)), 16));
}
inline void store_floats(float *to, Vector v) { _mm256_storeu_ps(to, v); }
inline void store_floats(uint16_t *to, Vector v) {
    const __m256i bits = _mm256_castps_si256(v), tie = _mm256_and_si256(_mm256_srli_epi32(bits, 16), _mm256_set1_epi32(1));
    const __m256i rounded = _mm256_srli_epi32(_mm256_add_epi32(_mm256_add_epi32(bits, _mm256_set1_epi32(0x7fff)), tie), 16);
    const __m256i number = _mm256_castps_si256(_mm256_cmp_ps(v, v, _CMP_ORD_Q));
    const __m256i words = _mm256_blendv_epi8(_mm256_set1_epi32(0x7fc0), rounded, number);
    _mm_storeu_si128((__m128i *)to, _mm_packus_epi32(_mm256_castsi256_si128(words), _mm256_extracti128_si256(words, 1)));
}
inline Vector kept(Vector v, unsigned bits) {
    const __m256i each = _mm256_setr_epi32(1, 2, 4, 8, 16, 32, 64, 128), all = _mm256_set1_epi32((int)bits);
    return _mm256_and_ps(v, _mm256_castsi256_ps(_mm256_cmpeq_epi32(_mm256_and_si256(all, each), each)));
}

}  // namespace

#include "product.h"

namespace {

// For every mask byte, 8 elements of `width` bytes: the one of column c takes the `size` bytes of the value that belongs
// there to its upper end; all other bytes are 0x80, which the shuffle turns to zero.
struct alignas(32) Table {
    uint8_t entry[256][32];
    constexpr Table(int size, int width) : entry() {
        for (int mask = 0; mask < 256; mask++) {
            for (int i = 0; i < 32; i++) entry[mask][i] = 0x80;
            for (int c = 0, value = 0; c < 8; c++) {
                if (!(mask >> c & 1)) continue;
                for (int i = 0; i < size; i++) entry[mask][(c + 1) * width - size + i] = (uint8_t)(value * size + i);
                value++;
            }
        }
    }
};

// The same for whole floats: the value's number; its sign bit says whether the column is kept.
struct alignas(32) Numbers {
    uint32_t entry[256][8];
    constexpr Numbers() : entry() {
        for (int mask = 0; mask < 256; mask++)
            for (int c = 0, value = 0; c < 8; c++)
                if (mask >> c & 1) entry[mask][c] = 0x80000000u | (uint32_t)value++;
    }
};

alignas(32) constexpr Table SPREAD16(2, 4), SPREAD_HALVES(2, 2), SPREAD8(1, 4);
alignas(32) constexpr Numbers SPREAD32;

template <class T>
inline __m256i look_up(const T &table, uint64_t mask) {
    return _mm256_load_si256((const __m256i *)((const char *)table.entry + mask));
}

struct Floats {  // what the kinds share: x, sums and tiles are floats
    typedef float Input, Output;
    typedef uint64_t Mask;
    typedef __m256 Weights, Inputs, Sum;
    static constexpr int STEP = 8, PER_COLUMN = 1, ABREAST = 2;
    static constexpr bool SCALED = false, SUMMED = false, DENSE = false;
    static constexpr Form FORM = FLOATS;

    static Mask mask(uint64_t word, int k) {  // byte k, times 32: one rotation and one `and`
        const int by = (8 * k - 5) & 63;
        return (word >> by | word << (64 - by)) & 0x1fe0;
    }
    static int count(Mask mask) { return __builtin_popcountll(mask); }
    static Inputs load(const float *x) {
        Inputs in = _mm256_load_ps(x);
        asm("" : "+x"(in));  // stays in its register: two loads a cycle are the bottleneck
        return in;
    }
    static Sum none() { return zero(); }
    static void add(Sum &sum, Weights w, Inputs x) { sum = fma(w, x, sum); }
    static Vector total(Sum sum) { return sum; }
    static bool arrange(const Call &call, float *to, int64_t width, float *, int64_t) {
        arrange_floats(call, to, width);
        return false;
    }
    static void place(const float *x, int64_t n, float *to, float *) { memcpy(to, x, (size_t)n * 4); }
    static void put(Weights w, float, float *to) { _mm256_storeu_ps(to, w); }
};

struct KindBF16 : Floats {  // the upper half of a float
    typedef uint16_t Value;
    static Weights spread(const uint16_t *v, Mask mask) {
        const __m256i both = _mm256_broadcastsi128_si256(_mm_loadu_si128((const __m128i *)v));
        return _mm256_castsi256_ps(_mm256_shuffle_epi8(both, look_up(SPREAD16, mask)));
    }
};

struct KindF16 : Floats {
    typedef uint16_t Value;
    static Weights spread(const uint16_t *v, Mask mask) {
        const __m128i to = _mm256_castsi256_si128(look_up(SPREAD_HALVES, mask));
        return _mm256_cvtph_ps(_mm_shuffle_epi8(_mm_loadu_si128((const __m128i *)v), to));
    }
};

struct KindF32 : Floats {
    typedef float Value;
    static Weights spread(const float *v, Mask mask) {
        const __m256i to = look_up(SPREAD32, mask);
        return _mm256_blendv_ps(zero(), _mm256_permutevar8x32_ps(_mm256_loadu_ps(v), to), _mm256_castsi256_ps(to));
    }
    static Weights all(const float *v) { return _mm256_loadu_ps(v); }
};

struct KindI8 : Floats {  // q in the upper byte of an integer: q * 2^24, exact as a float
    typedef int8_t Value;
    static constexpr bool SCALED = true;
    static Weights spread(const int8_t *v, Mask mask) {
        const __m256i all = _mm256_castpd_si256(_mm256_broadcast_sd((const double *)v));
        return _mm256_cvtepi32_ps(_mm256_shuffle_epi8(all, look_up(SPREAD8, mask)));
    }
    static Vector total(Sum sum) { return _mm256_mul_ps(sum, splat(0x1p-24f)); }
    static void put(Weights w, float scale, float *to) { _mm256_storeu_ps(to, _mm256_mul_ps(w, splat(scale * 0x1p-24f))); }
};

struct DenseBF16 {  // the even columns of 16 are the lower halves of 8 words: a shift makes them floats, a mask the odd ones
    typedef uint16_t Value;
    typedef float Input;
    struct Weights {
        __m256i both;
    };
    struct Inputs {
        __m256 even, odd;
    };
    typedef __m256 Sum;
    static constexpr int STEP = 16, PER_COLUMN = 1, ABREAST = DENSE_ABREAST;
    static constexpr bool DENSE = true;
    static constexpr Form FORM = SPLIT;
    static Weights all(const uint16_t *v) { return {_mm256_loadu_si256((const __m256i *)v)}; }
    static Inputs load(const float *x) { return {Floats::load(x), Floats::load(x + 8)}; }
    static Sum none() { return zero(); }
    static void add(Sum &sum, Weights w, Inputs x) {
        sum = fma(_mm256_castsi256_ps(_mm256_slli_epi32(w.both, 16)), x.even, sum);
        sum = fma(_mm256_castsi256_ps(_mm256_and_si256(w.both, _mm256_set1_epi32((int)0xffff0000))), x.odd, sum);
    }
    static Vector total(Sum sum) { return sum; }
    static void place(const float *x, int64_t n, float *to, float *) {
        for (int64_t j = 0; j < n; j++) to[split_place<STEP>(j)] = x[j];
    }
};

typedef Whole<KindF32> DenseF32;
typedef KindsByType<KindBF16, KindF16, KindF32, KindI8, DenseBF16, DenseF32> Kinds;

}  // namespace

#include "pair.h"
#include "steps.h"

LOSA_KERNEL(avx2)
LOSA_DECODER(avx2)
LOSA_OPPONENTS(avx2)
LOSA_PAIR(avx2)
