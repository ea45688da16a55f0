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

// Keeps a load in its register for all rows of the weight, where compilers would rather load it again for each.
template <class T>
inline T hold(T v) {
#ifndef LOSA_EMULATED  // tests run these sources on processors without AVX-512, where a vector is an array
    asm("" : "+v"(v));
#endif
    return v;
}

}  // namespace
