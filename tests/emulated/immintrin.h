// The AVX-512 instructions that losa's kernels use, in plain C++, written from Intel's description of each: found before the
// compiler's own header (-I), it lets the AVX-512 sources be tested on any processor.
#pragma once
#include <math.h>
#include <stdint.h>
#include <string.h>

#define LOSA_EMULATED

template <int BYTES, int TAG>
struct Register {
    uint8_t byte[BYTES];
};
typedef Register<64, 0> __m512;
typedef Register<64, 1> __m512i;
typedef Register<32, 1> __m256i;
typedef Register<16, 1> __m128i;
typedef uint16_t __mmask16;
typedef uint32_t __mmask32;
typedef uint64_t __mmask64;

struct __m256bh {  // cast to an integer register of its size
    __m256i bits;
    explicit operator __m256i() const { return bits; }
};

template <class T, class R>
inline T lane(const R &r, int i) {
    T value;
    memcpy(&value, r.byte + i * sizeof(T), sizeof(T));
    return value;
}
template <class T, class R>
inline void set(R &r, int i, T value) {
    memcpy(r.byte + i * sizeof(T), &value, sizeof(T));
}
template <class R>
inline R load(const void *from) {
    R r;
    memcpy(r.byte, from, sizeof r.byte);
    return r;
}
template <class T, class R, class F>
inline R each(F f) {  // lane i is f(i), converted to T
    R r;
    for (int i = 0; i < (int)(sizeof r.byte / sizeof(T)); i++) set<T>(r, i, (T)f(i));
    return r;
}

inline __m512 _mm512_setzero_ps() { return {}; }
inline __m512i _mm512_setzero_si512() { return {}; }
inline __m512 _mm512_set1_ps(float f) {
    return each<float, __m512>([&](int) { return f; });
}
inline __m512i _mm512_set1_epi8(char c) {
    return each<char, __m512i>([&](int) { return c; });
}
inline __m512i _mm512_set1_epi32(int n) {
    return each<int32_t, __m512i>([&](int) { return n; });
}

inline __m512 _mm512_loadu_ps(const void *p) { return load<__m512>(p); }
inline __m512i _mm512_loadu_si512(const void *p) { return load<__m512i>(p); }
inline __m256i _mm256_loadu_si256(const __m256i *p) { return load<__m256i>(p); }
inline __m128i _mm_loadu_si128(const __m128i *p) { return load<__m128i>(p); }
inline void _mm512_storeu_ps(void *p, __m512 v) { memcpy(p, v.byte, 64); }
inline void _mm512_storeu_si512(void *p, __m512i v) { memcpy(p, v.byte, 64); }
inline void _mm256_storeu_si256(__m256i *p, __m256i v) { memcpy(p, v.byte, 32); }

inline __m512 _mm512_castsi512_ps(__m512i v) { return load<__m512>(v.byte); }
inline __m512i _mm512_castps_si512(__m512 v) { return load<__m512i>(v.byte); }
inline __m512 _mm512_fmadd_ps(__m512 a, __m512 b, __m512 c) {
    return each<float, __m512>([&](int i) { return fmaf(lane<float>(a, i), lane<float>(b, i), lane<float>(c, i)); });
}
inline __m512 _mm512_mul_ps(__m512 a, __m512 b) {
    return each<float, __m512>([&](int i) { return lane<float>(a, i) * lane<float>(b, i); });
}
inline __m512 _mm512_xor_ps(__m512 a, __m512 b) {
    return each<uint32_t, __m512>([&](int i) { return lane<uint32_t>(a, i) ^ lane<uint32_t>(b, i); });
}
inline float _mm512_reduce_add_ps(__m512 v) {
    float f[16];
    memcpy(f, v.byte, 64);
    for (int width = 8; width; width /= 2)
        for (int i = 0; i < width; i++) f[i] += f[i + width];
    return f[0];
}
inline __m512i _mm512_add_epi32(__m512i a, __m512i b) {
    return each<uint32_t, __m512i>([&](int i) { return lane<uint32_t>(a, i) + lane<uint32_t>(b, i); });
}
inline __m512i _mm512_sub_epi32(__m512i a, __m512i b) {
    return each<uint32_t, __m512i>([&](int i) { return lane<uint32_t>(a, i) - lane<uint32_t>(b, i); });
}
inline __m512i _mm512_and_si512(__m512i a, __m512i b) {
    return each<uint32_t, __m512i>([&](int i) { return lane<uint32_t>(a, i) & lane<uint32_t>(b, i); });
}
inline __m512i _mm512_slli_epi32(__m512i a, unsigned n) {
    return each<uint32_t, __m512i>([&](int i) { return lane<uint32_t>(a, i) << n; });
}
inline __m512i _mm512_srli_epi32(__m512i a, unsigned n) {
    return each<uint32_t, __m512i>([&](int i) { return lane<uint32_t>(a, i) >> n; });
}
inline __m256i _mm512_cvtepi32_epi16(__m512i a) {
    return each<uint16_t, __m256i>([&](int i) { return lane<uint32_t>(a, i); });
}
inline __mmask16 _mm512_cmpord_ps_mask(__m512 a, __m512 b) {
    unsigned mask = 0;
    for (int i = 0; i < 16; i++) mask |= (unsigned)!(isnan(lane<float>(a, i)) || isnan(lane<float>(b, i))) << i;
    return (__mmask16)mask;
}
inline __m512i _mm512_mask_mov_epi32(__m512i otherwise, __mmask16 mask, __m512i a) {
    return each<uint32_t, __m512i>([&](int i) { return lane<uint32_t>(mask >> i & 1 ? a : otherwise, i); });
}
inline __m512 _mm512_maskz_mov_ps(__mmask16 mask, __m512 a) {
    return each<float, __m512>([&](int i) { return mask >> i & 1 ? lane<float>(a, i) : 0; });
}
inline __m512i _mm512_cvtepu16_epi32(__m256i a) {
    return each<uint32_t, __m512i>([&](int i) { return lane<uint16_t>(a, i); });
}
inline __m512i _mm512_cvtepi8_epi32(__m128i a) {
    return each<int32_t, __m512i>([&](int i) { return lane<int8_t>(a, i); });
}
inline __m512 _mm512_cvtepi32_ps(__m512i a) {
    return each<float, __m512>([&](int i) { return (float)lane<int32_t>(a, i); });
}
inline __m512 _mm512_cvtph_ps(__m256i a) {
    return each<float, __m512>([&](int i) {
        const uint16_t h = lane<uint16_t>(a, i);
        const int exponent = h >> 10 & 31, mantissa = h & 1023;
        const float size = exponent == 31 ? (mantissa ? NAN : INFINITY)
                           : exponent     ? ldexpf((float)(1024 + mantissa), exponent - 25)
                                          : ldexpf((float)mantissa, -24);
        return h & 0x8000 ? -size : size;
    });
}

template <class T, class R>
inline R expand_lanes(uint64_t mask, const R &a) {
    int next = 0;
    return each<T, R>([&](int i) { return mask >> i & 1 ? lane<T>(a, next++) : (T)0; });
}
inline __m512 _mm512_maskz_expand_ps(__mmask16 mask, __m512 a) { return expand_lanes<float>(mask, a); }
inline __m512i _mm512_maskz_expand_epi16(__mmask32 mask, __m512i a) { return expand_lanes<uint16_t>(mask, a); }
inline __m512i _mm512_maskz_expand_epi8(__mmask64 mask, __m512i a) { return expand_lanes<uint8_t>(mask, a); }

// Four products of bytes without sign (a) and with sign (b) a lane.
inline __m512i _mm512_dpbusd_epi32(__m512i sum, __m512i a, __m512i b) {
    return each<int32_t, __m512i>([&](int i) {
        int32_t total = lane<int32_t>(sum, i);
        for (int k = 4 * i; k < 4 * i + 4; k++) total += (int32_t)lane<uint8_t>(a, k) * lane<int8_t>(b, k);
        return total;
    });
}
inline __m256bh _mm512_cvtneps_pbh(__m512 a) {  // to nearest, ties to even; subnormals become zero
    return {each<uint16_t, __m256i>([&](int i) {
        uint32_t bits = lane<uint32_t>(a, i);
        if ((bits & 0x7fffffff) > 0x7f800000) return (uint16_t)(bits >> 16 | 0x40);
        if (!(bits & 0x7f800000)) return (uint16_t)(bits >> 16 & 0x8000);
        return (uint16_t)((bits + 0x7fff + (bits >> 16 & 1)) >> 16);
    })};
}
