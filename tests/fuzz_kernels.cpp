// Random products under AddressSanitizer and UndefinedBehaviorSanitizer: `make fuzz`. Every buffer is exactly as large as
// docs/format.md has it, so that one byte read or written outside of one ends the run; results are compared with double.
//
// usage: fuzz_kernels SECONDS [SEED]; the seed of a failure is printed with it.
#include "../src/losa/sparse/csrc/losa.h"

#include <chrono>
#include <cmath>
#include <cstdio>
#include <random>
#include <string>
#include <vector>

extern "C" const char *losa_features(void);
#define DECLARE(name)                                                                                              \
    extern "C" int losa_multiply_##name(const Call *);                                                             \
    extern "C" int losa_expand_##name(const Matrix *, int64_t, int64_t, void *, int64_t, int32_t);
#ifdef LOSA_FUZZ_EMULATED
DECLARE(avx512)
extern "C" int losa_multiply_avx512_bf16(const Call *);
extern "C" int losa_expand_avx512_bf16_bf16(const Matrix *, int64_t, int64_t, void *, int64_t, int32_t);
#else
DECLARE(portable)
DECLARE(avx2)
#endif

namespace {

typedef int (*Multiply)(const Call *);
typedef int (*Expand)(const Matrix *, int64_t, int64_t, void *, int64_t, int32_t);
struct Kernel {
    const char *name;
    Multiply multiply;
    Expand expand;
    bool bf16;  // bf16 tiles; bf16 values by bf16 x, or int8
};

std::mt19937_64 engine;
int64_t between(int64_t low, int64_t high) { return std::uniform_int_distribution<int64_t>(low, high)(engine); }
double uniform() { return std::uniform_real_distribution<double>(0, 1)(engine); }

uint16_t half_of(float value) {  // of what a half holds exactly: k / 256, |k| < 1024
    const int k = (int)(std::fabs(value) * 256);
    if (!k) return 0;
    const int exponent = (int)std::log2(k);
    return (uint16_t)((value < 0 ? 0x8000 : 0) | (exponent - 8 + 15) << 10 | ((k << 10 >> exponent) & 1023));
}

// memory of exactly so many bytes, which AddressSanitizer walls in
struct Exact {
    void *data;
    explicit Exact(size_t bytes) : data(malloc(bytes ? bytes : 1)) {}
    ~Exact() { free(data); }
    Exact(const Exact &) = delete;
};

[[noreturn]] void fail(const char *kernel, uint64_t seed, const std::string &what) {
    printf("%s, seed %llu: %s\n", kernel, (unsigned long long)seed, what.c_str());
    abort();
}

void one(const Kernel &kernel, uint64_t seed) {
    engine.seed(seed);
    const int64_t out = between(0, 3) ? between(1, 12) : between(1, 300);
    const int64_t in = between(0, 3) ? between(1, 140) : between(1, 1100);
    const int64_t tokens = between(1, 10), bytes = (in + 7) / 8, groups = (in + 255) / 256;
    const double density = between(0, 4) ? uniform() : (double)between(0, 1);
    const Type type = kernel.bf16 ? (between(0, 1) ? BF16 : I8) : (Type)between(F32, I8);
    const Type x_type = kernel.bf16 && type == BF16 ? BF16 : (Type)between(F32, BF16);
    const int64_t same = between(0, 3) ? -1 : (int64_t)(density * (double)in);  // of every row, as N:M has it

    Exact mask((size_t)(out * bytes)), offsets((size_t)(out + 1) * 4), scales((size_t)(out * groups) * 2);
    memset(mask.data, 0, (size_t)(out * bytes));
    std::vector<double> dense((size_t)(out * in)), kept;
    for (int64_t i = 0; i < out; i++) {
        ((int32_t *)offsets.data)[i] = (int32_t)kept.size();
        for (int64_t g = 0; g < groups; g++) ((uint16_t *)scales.data)[i * groups + g] = float_bf16(between(0, 3) ? 0.25f : 0);
        int64_t left = same;
        for (int64_t j = 0; j < in; j++) {
            const bool keep = same < 0 ? uniform() < density : (double)(in - j) * uniform() < (double)left;
            if (!keep) continue;
            left--;
            const double value = type == I8 ? (double)between(-127, 127) : (double)between(-127, 127) / 64;
            ((uint8_t *)mask.data)[i * bytes + j / 8] |= (uint8_t)(1 << j % 8);
            dense[(size_t)(i * in + j)] =
                type == I8 ? value * bf16_float(((uint16_t *)scales.data)[i * groups + j / 256]) : value;
            kept.push_back(value);
        }
    }
    ((int32_t *)offsets.data)[out] = (int32_t)kept.size();
    const size_t size = type == F32 ? 4 : type == I8 ? 1 : 2, entries = kept.size() + 64;
    Exact values(entries * size);
    for (size_t i = 0; i < entries; i++) {
        const float v = i < kept.size() ? (float)kept[i] : NAN;  // what pads the values may be read, not used
        if (type == F32) ((float *)values.data)[i] = v;
        if (type == BF16) ((uint16_t *)values.data)[i] = float_bf16(v);
        if (type == F16) ((uint16_t *)values.data)[i] = i < kept.size() ? half_of(v) : 0x7e00;
        if (type == I8) ((int8_t *)values.data)[i] = i < kept.size() ? (int8_t)v : 99;
    }

    const size_t x_size = x_type == F32 ? 4 : 2;
    Exact x((size_t)(tokens * in) * x_size), y((size_t)(tokens * out) * x_size), bias((size_t)out * 4);
    std::vector<double> xs((size_t)(tokens * in));
    for (size_t i = 0; i < xs.size(); i++) {
        xs[i] = (double)between(-120, 120) / 16;
        if (x_type == F32) ((float *)x.data)[i] = (float)xs[i];
        else ((uint16_t *)x.data)[i] = float_bf16((float)xs[i]);
    }
    for (int64_t i = 0; i < out; i++) ((float *)bias.data)[i] = (float)i;

    Call call = {};
    Matrix &w = call.weight;
    w = {values.data, (uint8_t *)mask.data, same < 0 ? (int32_t *)offsets.data : nullptr, nullptr, out, in, same, type};
    if (type == I8) w.scales = (uint16_t *)scales.data;
    call.x = x.data, call.y = y.data, call.rows = tokens, call.x_type = x_type, call.threads = (int32_t)between(1, 3);
    if (between(0, 1)) call.bias = bias.data, call.bias_type = F32;
    if (kernel.multiply(&call)) fail(kernel.name, seed, "multiply returned an error");
    for (int64_t t = 0; t < tokens; t++) {
        for (int64_t i = 0; i < out; i++) {
            double want = call.bias ? (double)i : 0, most = want + 1e-6, largest = 0, weights = 0;
            for (int64_t j = 0; j < in; j++) {
                const double weight = dense[(size_t)(i * in + j)], input = xs[(size_t)(t * in + j)];
                want += weight * input, most += std::fabs(weight * input), weights += std::fabs(weight);
                largest = std::fmax(largest, std::fabs(input));
            }
            const double got = read_float(y.data, x_type, t * out + i);
            double allowed = 4e-6 * most + (x_type == BF16 ? std::fabs(want) / 256 : 0);
            if (kernel.bf16 && type == I8) allowed += weights * largest / 65536;
            if (!(std::fabs(got - want) <= allowed)) {
                fail(kernel.name, seed, std::to_string(got) + " is not " + std::to_string(want));
            }
        }
    }

    const int64_t first = between(0, out - 1), rows = between(1, out - first), stride = (in + 63) / 64 * 64;
    Exact tile((size_t)(rows * stride) * (kernel.bf16 ? 2 : 4));
    if (kernel.expand(&w, first, rows, tile.data, stride, call.threads)) fail(kernel.name, seed, "expand returned an error");
    for (int64_t i = 0; i < rows; i++) {
        for (int64_t j = 0; j < stride; j++) {
            const double want = j < in ? dense[(size_t)((first + i) * in + j)] : 0;
            const double got = read_float(tile.data, kernel.bf16 ? BF16 : F32, i * stride + j);
            if (got != want) fail(kernel.name, seed, "expanded " + std::to_string(got) + ", not " + std::to_string(want));
        }
    }
}

}  // namespace

int main(int count, char **arguments) {
    const double seconds = count > 1 ? atof(arguments[1]) : 10;
    uint64_t seed = count > 2 ? strtoull(arguments[2], nullptr, 10) : std::random_device()();
    std::vector<Kernel> kernels;
#ifdef LOSA_FUZZ_EMULATED
    kernels.push_back({"avx512", losa_multiply_avx512, losa_expand_avx512, false});
    kernels.push_back({"avx512-bf16", losa_multiply_avx512_bf16, losa_expand_avx512_bf16_bf16, true});
#else
    kernels.push_back({"portable", losa_multiply_portable, losa_expand_portable, false});
    if (std::string(losa_features()).find("avx2 ") != std::string::npos)
        kernels.push_back({"avx2", losa_multiply_avx2, losa_expand_avx2, false});
#endif
    const auto start = std::chrono::steady_clock::now();
    int64_t done = 0;
    while (std::chrono::duration<double>(std::chrono::steady_clock::now() - start).count() < seconds) {
        for (const Kernel &kernel : kernels) one(kernel, seed);
        seed++, done++;
    }
    for (const Kernel &kernel : kernels) printf("%s ", kernel.name);
    printf("passed on %lld random products; the next seed is %llu\n", (long long)done, (unsigned long long)seed);
    return done ? 0 : 1;
}
