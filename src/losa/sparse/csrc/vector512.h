// The vector of the AVX-512 sources.
#pragma once
#include "losa.h"

#include <immintrin.h>

namespace {

typedef __m512 Vector;

inline Vector zero() { return _mm512_setzero_ps(); }
inline Vector splat(float f) { return _mm512_set1_ps(f); }
inline Vector fma(Vector a, Vector b, Vector c) { return _mm512_fmadd_ps(a, b, c); }

inline float sum(Vector v) { return _mm512_reduce_add_ps(v); }

inline Vector bf16_floats(__m256i v) {
    return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(v), 16));
}
inline Vector i8_floats(__m128i v) { return _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(v)); }

inline Vector mixed(Vector a, Vector b) { return _mm512_xor_ps(a, b); }

constexpr int LANES = 16;
inline Vector load_floats(const float *v) { return _mm512_loadu_ps(v); }
inline Vector load_floats(const uint16_t *v) { return bf16_floats(_mm256_loadu_si256((const __m256i *)v)); }
inline void store_floats(float *to, Vector v) { _mm512_storeu_ps(to, v); }
inline void store_floats(uint16_t *to, Vector v) {
    const __m512i bits = _mm512_castps_si512(v), tie = _mm512_and_si512(_mm512_srli_epi32(bits, 16), _mm512_set1_epi32(1));
    const __m512i rounded = _mm512_srli_epi32(_mm512_add_epi32(_mm512_add_epi32(bits, _mm512_set1_epi32(0x7fff)), tie), 16);
    const __mmask16 number = _mm512_cmpord_ps_mask(v, v);
    _mm256_storeu_si256((__m256i *)to, _mm512_cvtepi32_epi16(_mm512_mask_mov_epi32(_mm512_set1_epi32(0x7fc0), number, rounded)));
}
inline Vector kept(Vector v, unsigned bits) { return _mm512_maskz_mov_ps((__mmask16)bits, v); }

// Keeps a load in its register for all rows of the weight, where compilers would rather load it again for each.
template <class T>
inline T hold(T v) {
#ifndef LOSA_EMULATED  // tests run these sources on processors without AVX-512, where a vector is an array
    asm("" : "+v"(v));
#endif
    return v;
}

}  // namespace
