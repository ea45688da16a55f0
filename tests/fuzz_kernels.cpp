// Random products and steps of decoding under AddressSanitizer and UndefinedBehaviorSanitizer: `make fuzz`. Every buffer is
// exactly as large as docs/format.md and steps.h have it, so that one byte read or written outside of one ends the run; results
// are compared with double.
//
// usage: fuzz_kernels SECONDS [SEED]; 0 seconds are one round; the seed of a failure is printed with it.
#include "../src/losa/sparse/csrc/portable.cpp"  // and with it the types of the steps

#include <chrono>
#include <cmath>
#include <cstdio>
#include <memory>
#include <random>
#include <string>
#include <vector>

extern "C" const char *losa_features(void);
#define DECLARE(name)                                                                                              \
    extern "C" int losa_multiply_##name(const Call *);                                                             \
    extern "C" int losa_expand_##name(const Matrix *, int64_t, int64_t, void *, int64_t, int32_t);                 \
    DECLARE_DECODER(name)
#define DECLARE_PAIR(name)                                                                                         \
    extern "C" int losa_effective_##name(const Pair *);                                                            \
    extern "C" int losa_gradients_##name(const Pair *);
#define DECLARE_DECODER(name)                                                                                      \
    extern "C" int losa_decode_##name(void *);                                                                     \
    extern "C" int losa_form_##name(const Matrix *);
extern "C" void losa_sums(const Matrix *, int16_t *, int32_t);
#ifdef LOSA_FUZZ_EMULATED
DECLARE(avx512)
DECLARE_PAIR(avx512)
extern "C" int losa_multiply_avx512_bf16(const Call *);
extern "C" int losa_expand_avx512_bf16(const Matrix *, int64_t, int64_t, void *, int64_t, int32_t);
DECLARE_DECODER(avx512_bf16)
#else
DECLARE(avx2)
DECLARE_PAIR(avx2)
#endif

namespace {

typedef int (*Multiply)(const Call *);
typedef int (*Expand)(const Matrix *, int64_t, int64_t, void *, int64_t, int32_t);
struct Kernel {
    const char *name;
    Multiply multiply;
    Expand expand;
    int (*decode)(void *);
    int (*form)(const Matrix *);
    bool bf16;  // bf16 tiles; bf16 values or int8
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
    Exact(size_t bytes, int) { if (posix_memalign(&data, 64, bytes)) abort(); memset(data, 0, bytes); }  // zeros at a line's beginning
    ~Exact() { free(data); }
    Exact(const Exact &) = delete;
};

[[noreturn]] void fail(const char *kernel, uint64_t seed, const std::string &what) {
    printf("%s, seed %llu: %s\n", kernel, (unsigned long long)seed, what.c_str());
    abort();
}

// a random weight: packed, or whole and dense
struct Drawn {
    Exact mask, offsets, scales, sums;
    std::unique_ptr<Exact> values;
    std::vector<double> dense;
    Matrix w = {};

    Drawn(int64_t out, int64_t in, Type type, bool packed)
        : mask((size_t)(out * ((in + 7) / 8))), offsets((size_t)(out + 1) * 4), scales((size_t)(out * ((in + 255) / 256)) * 2),
          sums((size_t)(out * ((in + 255) / 256)) * 2), dense((size_t)(out * in)) {
        const int64_t bytes = (in + 7) / 8, groups = (in + 255) / 256;
        const double density = !packed ? 1 : between(0, 4) ? uniform() : (double)between(0, 1);
        const int64_t same = !packed ? in : between(0, 3) ? -1 : (int64_t)(density * (double)in);  // of every row, as N:M has it
        std::vector<double> kept;
        memset(mask.data, 0, (size_t)(out * bytes));
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
        const size_t size = type == F32 ? 4 : type == I8 ? 1 : 2, entries = kept.size() + (packed ? 64 : 0);
        values.reset(new Exact(entries * size));
        for (size_t i = 0; i < entries; i++) {
            const float v = i < kept.size() ? (float)kept[i] : NAN;  // what pads the values may be read, not used
            if (type == F32) ((float *)values->data)[i] = v;
            if (type == BF16) ((uint16_t *)values->data)[i] = float_bf16(v);
            if (type == F16) ((uint16_t *)values->data)[i] = i < kept.size() ? half_of(v) : 0x7e00;
            if (type == I8) ((int8_t *)values->data)[i] = i < kept.size() ? (int8_t)v : 99;
        }
        w.values = values->data, w.out = out, w.in = in, w.per_row = same, w.type = type;
        if (packed) w.mask = (uint8_t *)mask.data;
        if (packed && same < 0) w.offsets = (int32_t *)offsets.data;
        if (type == I8) w.scales = (uint16_t *)scales.data;
    }
};

void one(const Kernel &kernel, uint64_t seed) {
    engine.seed(seed);
    const int64_t out = between(0, 3) ? between(1, 12) : between(1, 300);
    const int64_t in = between(0, 3) ? between(1, 140) : between(1, 1100);
    const int64_t tokens = between(0, 5) ? between(1, 10) : between(1, 66);  // natively up to 64
    const Type type = kernel.bf16 ? (between(0, 1) ? BF16 : I8) : (Type)between(F32, I8);
    const Type x_type = (Type)between(F32, BF16);
    const Drawn drawn(out, in, type, true);
    const std::vector<double> &dense = drawn.dense;

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
    const Matrix &w = drawn.w;
    call.weight = w;
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

// a vector that steps read and write: room up to a multiple of 64 only where one multiplies by it
struct Floats64 {
    Exact room;
    int64_t n;
    explicit Floats64(int64_t count, bool multiplied = true) : room((size_t)(multiplied ? round_up(count, 64) : count) * 4, 0), n(count) {}
    float *at() const { return (float *)room.data; }
    std::vector<double> now() const { return std::vector<double>(at(), at() + n); }
};

// F32 or BF16, of random numbers
struct Parameters {
    Type type;
    Exact room;
    Parameters(int64_t n, double size, Type kind) : type(kind), room((size_t)n * (kind == F32 ? 4 : 2)) {
        for (int64_t i = 0; i < n; i++) {
            const float v = (float)(size * (2 * uniform() - 1));
            if (type == F32) ((float *)room.data)[i] = v;
            else ((uint16_t *)room.data)[i] = float_bf16(v);
        }
    }
    double operator[](int64_t i) const { return read_float(room.data, type, i); }
};

Type either() { return (Type)between(F32, BF16); }

std::vector<double> normed(const double *x, int64_t n, const Parameters *weight, double epsilon) {
    double squares = 0;
    for (int64_t i = 0; i < n; i++) squares += x[i] * x[i];
    std::vector<double> y(x, x + n);
    if (weight)
        for (int64_t i = 0; i < n; i++) y[(size_t)i] *= (*weight)[i] / std::sqrt(squares / (double)n + epsilon);
    return y;
}

// One step after the other of a block with random weights, each looked at; then all of them at once, which must give the same.
struct Block {
    const Kernel &kernel;
    uint64_t seed;
    std::vector<Step> steps;
    std::vector<std::unique_ptr<Drawn>> weights;
    std::vector<std::unique_ptr<Parameters>> parameters;
    std::vector<std::unique_ptr<Floats64>> vectors;
    Plan plan = {};

    void close(const char *what, const std::vector<double> &want, const float *got, const std::vector<double> &allowed) const {
        for (size_t i = 0; i < want.size(); i++)
            if (!(std::fabs(got[i] - want[i]) <= allowed[i] + 1e-6))
                fail(kernel.name, seed, std::string(what) + ": " + std::to_string(got[i]) + " is not " + std::to_string(want[i]));
    }

    void go(const Step *from, size_t count) {
        Exact counters(count * sizeof(Counter), 0);
        plan.steps = from, plan.count = (int64_t)count, plan.counters = (Counter *)counters.data;
        if (kernel.decode(&plan)) fail(kernel.name, seed, "decode returned an error");
    }

    void go(const Step &step) {
        steps.push_back(step);
        const Step alone = step;
        go(&alone, 1);
    }

    Parameters *draw(int64_t n, double size, Type type) {
        parameters.emplace_back(new Parameters(n, size, type));
        return parameters.back().get();
    }

    float *room(int64_t n, bool multiplied = true) {
        vectors.emplace_back(new Floats64(n, multiplied));
        return vectors.back()->at();
    }

    void norm(const Floats64 &x, const Floats64 &y) {
        const Parameters *weight = draw(x.n, 2, either());
        Step s = {};
        s.does = NORM, s.x = x.at(), s.y = y.at(), s.weight = weight->room.data, s.type = weight->type, s.n = x.n, s.epsilon = 1e-5f;
        go(s);
        const std::vector<double> from = x.now();
        close("norm", normed(from.data(), x.n, weight, 1e-5), y.at(), std::vector<double>((size_t)x.n, 1e-4));
    }

    struct Product {
        std::vector<double> want, allowed;
    };

    // A linear, its x brought into its form, and what it should give.
    Linear linear(const Floats64 &x, const Floats64 &y, Product &product) {
        const bool packed = between(0, 1);
        Type type = packed ? (kernel.bf16 ? (between(0, 1) ? BF16 : I8) : (Type)between(F32, I8)) : either();
        weights.emplace_back(new Drawn(y.n, x.n, type, packed));
        Drawn &drawn = *weights.back();
        if (packed && type == I8 && between(0, 1)) {
            losa_sums(&drawn.w, (int16_t *)drawn.sums.data, plan.threads);
            drawn.w.sums = (int16_t *)drawn.sums.data;
        }
        Linear l = {};
        l.weight = drawn.w, l.x = x.at(), l.y = y.at();
        const Parameters *bias = between(0, 1) ? draw(y.n, 1, either()) : nullptr;
        if (bias) l.bias = bias->room.data, l.bias_type = bias->type;
        const int form = kernel.form(&l.weight);
        if (form != FLOATS) {
            const int64_t columns = round_up(x.n, 64);
            l.x = room(form == SPLIT ? columns : columns / 2, false);
            if (form == FIXED) l.scales = room((x.n + GROUP - 1) / GROUP, false);
            Step s = {};
            s.does = PLACE, s.count = 1, s.linear[0] = l, s.x = x.at(), s.n = x.n;
            go(s);
        }
        const std::vector<double> from = x.now();
        for (int64_t i = 0; i < y.n; i++) {
            double want = bias ? (*bias)[i] : 0, most = std::fabs(want), largest = 0, sizes = 0;
            for (int64_t j = 0; j < x.n; j++) {
                const double weight = drawn.dense[(size_t)(i * x.n + j)], term = weight * from[(size_t)j];
                want += term, most += std::fabs(term), sizes += std::fabs(weight);
                largest = std::fmax(largest, std::fabs(from[(size_t)j]));
            }
            product.want.push_back(want);
            product.allowed.push_back(4e-6 * most + (form == FIXED ? sizes * largest / 65536 : 0));
        }
        return l;
    }

    void multiply(Does does, const Floats64 &x, const std::vector<const Floats64 *> &ys) {
        Step s = {};
        s.does = does, s.count = (int32_t)ys.size();
        Product products[3];
        for (size_t i = 0; i < ys.size(); i++) s.linear[i] = linear(x, *ys[i], products[i]);
        const std::vector<double> before = ys[0]->now();
        go(s);
        if (does == GATE) {
            Product both;
            for (size_t i = 0; i < before.size(); i++) {
                const double g = products[0].want[i], up = products[1].want[i];
                const double silu = g / (1 + std::exp(-g)), off = 1.1 * products[0].allowed[i] + 1e-6 * std::fabs(g);
                both.want.push_back(silu * up);
                both.allowed.push_back(off * std::fabs(up) + (std::fabs(silu) + off) * products[1].allowed[i]);
            }
            products[0] = both;
        }
        for (size_t i = 0; i < (does == GATE ? 1 : ys.size()); i++) {
            for (size_t j = 0; does == ADD && j < before.size(); j++)
                products[i].want[j] += before[j], products[i].allowed[j] += 1e-6 * std::fabs(before[j]);
            close(does == GATE ? "gate" : "product", products[i].want, ys[i]->at(), products[i].allowed);
        }
    }

    void attend(const Floats64 &query, const Floats64 &key, const Floats64 &value, const Floats64 &y, int64_t heads, int64_t kv_heads, int64_t dim, int64_t layers, const Parameters &cosines, const Parameters &sines) {
        Step s = {};
        const bool norms = between(0, 1);
        const Type type = either();
        const Parameters *q_norm = norms ? draw(dim, 2, type) : nullptr, *k_norm = norms ? draw(dim, 2, type) : nullptr;
        s.does = ATTEND, s.query = query.at(), s.key = key.at(), s.value = value.at(), s.y = y.at();
        if (norms) s.query_norm = q_norm->room.data, s.key_norm = k_norm->room.data, s.type = type;
        s.heads = heads, s.kv_heads = kv_heads, s.dim = dim, s.layer = between(0, layers - 1), s.epsilon = 1e-5f, s.scaling = 0.01f;
        s.window = between(0, 1) ? 0 : between(2, plan.slot + 3);
        const std::vector<double> q = query.now(), k = key.now(), v = value.now();
        go(s);
        const auto turned = [&](const double *x, const Parameters *weight) {
            std::vector<double> from = normed(x, dim, weight, 1e-5), to = from;
            for (int64_t i = 0, half = dim / 2; i < half; i++) {
                const double low = from[(size_t)i], high = from[(size_t)(half + i)];
                to[(size_t)i] = low * cosines[i] - high * sines[i];
                to[(size_t)(half + i)] = high * cosines[half + i] + low * sines[half + i];
            }
            return to;
        };
        const auto cached = [&](const void *cache, int64_t head, int64_t place, int64_t i) -> double {
            return read_float(cache, plan.cache_type, s.layer * plan.layer_size + (head * plan.capacity + place) * dim + i);
        };
        const double rounding = plan.cache_type == F32 ? 1e-5 : 1.0 / 256;
        const int64_t first = s.window && plan.slot >= s.window ? plan.slot + 1 - s.window : 0;
        for (int64_t h = 0; h < heads; h++) {
            const int64_t head = h / (heads / kv_heads);
            const std::vector<double> mine = turned(q.data() + h * dim, q_norm), now = turned(k.data() + head * dim, k_norm);
            double size = 0;
            for (double part : now) size += std::fabs(part);
            for (int64_t i = 0; i < dim; i++) {
                if (!(std::fabs(cached(plan.keys, head, plan.slot, i) - now[(size_t)i]) <= rounding * (size + 1e-3)))
                    fail(kernel.name, seed, "a key is not what it should be");
                const double is = cached(plan.values, head, plan.slot, i), was = v[(size_t)(head * dim + i)];
                if (!(std::fabs(is - was) <= rounding * std::fabs(was))) fail(kernel.name, seed, "a value is not what it should be");
            }
            std::vector<double> scores, want((size_t)dim), allowed((size_t)dim);
            double most = -INFINITY, total = 0, off = 1e-5;
            for (int64_t place = first; place <= plan.slot; place++) {
                double score = 0, sizes = 0;
                for (int64_t i = 0; i < dim; i++) {
                    const double term = mine[(size_t)i] * cached(plan.keys, head, place, i);
                    score += term, sizes += std::fabs(term);
                }
                off = std::fmax(off, 1e-5 * sizes * s.scaling);
                scores.push_back(plan.visible && !plan.visible[place] ? -INFINITY : score * s.scaling);
                most = std::fmax(most, scores.back());
            }
            for (double &score : scores) total += score = std::exp(score - most);
            for (int64_t i = 0; i < dim; i++) {
                for (int64_t place = first; place <= plan.slot; place++) {
                    const double part = scores[(size_t)(place - first)] / total * cached(plan.values, head, place, i);
                    want[(size_t)i] += part, allowed[(size_t)i] += (std::exp(2 * off) - 1) * std::fabs(part) + 1e-5 * std::fabs(part);
                }
            }
            close("attention", want, y.at() + h * dim, allowed);
        }
    }
};

void steps(const Kernel &kernel, uint64_t seed) {
    engine.seed(seed);
    const auto size = [] { return between(0, 3) ? between(1, 70) : between(1, 600); };
    const int64_t width = size(), middle = size(), dim = 2 * between(1, 20), kv_heads = between(1, 3), layers = between(1, 2);
    const int64_t heads = kv_heads * between(1, 3), vocabulary = between(1, 5);
    Block block = {kernel, seed, {}, {}, {}, {}, {}};
    Plan &plan = block.plan;
    plan.threads = (int32_t)between(1, 3), plan.token = between(0, vocabulary - 1), plan.slot = between(0, 20);
    plan.capacity = plan.slot + 1 + between(0, 4), plan.layer_size = kv_heads * plan.capacity * dim, plan.cache_type = either();
    const Parameters keys(layers * plan.layer_size, 2, plan.cache_type), values(layers * plan.layer_size, 2, plan.cache_type);
    const Parameters cosines(dim, 1, F32), sines(dim, 1, F32);
    const Exact scores((size_t)(heads * plan.capacity) * 4), visible((size_t)plan.slot + 1);
    for (int64_t i = 0; i <= plan.slot; i++) ((uint8_t *)visible.data)[i] = i == plan.slot || between(0, 2) > 0;
    plan.keys = keys.room.data, plan.values = values.room.data, plan.scores = (float *)scores.data;
    plan.cosines = (float *)cosines.room.data, plan.sines = (float *)sines.room.data;
    if (between(0, 1)) plan.visible = (uint8_t *)visible.data;
    const Floats64 hidden(width), normed(width), query(heads * dim, false), key(kv_heads * dim, false), value(kv_heads * dim, false);
    const Floats64 attended(heads * dim), gated(middle), logits(size(), false);

    const Parameters *table = block.draw(vocabulary * width, 4, either());
    Step s = {};
    s.does = EMBED, s.y = hidden.at(), s.table = table->room.data, s.n = width, s.type = table->type;
    block.go(s);
    for (int64_t i = 0; i < width; i++)
        if (hidden.at()[i] != (float)(*table)[plan.token * width + i]) fail(kernel.name, seed, "a wrong embedding");
    block.norm(hidden, normed);
    block.multiply(MULTIPLY, normed, {&query, &key, &value});
    block.attend(query, key, value, attended, heads, kv_heads, dim, layers, cosines, sines);
    block.multiply(ADD, attended, {&hidden});
    block.norm(hidden, normed);
    block.multiply(GATE, normed, {&gated, &gated});
    block.multiply(ADD, gated, {&hidden});
    block.norm(hidden, normed);
    block.multiply(MULTIPLY, normed, {&logits});
    const std::vector<double> before = logits.now();
    block.go(block.steps.data(), block.steps.size());
    if (logits.now() != before) fail(kernel.name, seed, "all steps at once are not what they are one by one");
}

// The masked low-rank linear's weight and gradients.
void pairs(const char *name, int (*effective)(const Pair *), int (*gradients)(const Pair *), uint64_t seed) {
    engine.seed(seed);
    const int64_t out = between(0, 3) ? between(1, 12) : between(1, 150), in = between(0, 3) ? between(1, 70) : between(1, 1100);
    const int64_t rank = between(1, 9), stride = rank + between(0, 2), bytes = (in + 7) / 8;
    const Parameters weight(out * in, 2, either()), a(rank * in, 2, F32), b((out - 1) * stride + rank, 2, F32);
    const Exact mask((size_t)(out * bytes));
    for (int64_t i = 0; i < out * bytes; i++) {
        const int64_t columns = in - i % bytes * 8;  // spare bits are 0
        ((uint8_t *)mask.data)[i] = (uint8_t)(between(0, 255) & (columns < 8 ? (1 << columns) - 1 : 255));
    }
    Pair p = {};
    p.weight = weight.room.data, p.mask = (uint8_t *)mask.data, p.a = (float *)a.room.data, p.b = (float *)b.room.data;
    p.out = out, p.in = in, p.rank = rank, p.b_stride = stride, p.piece = between(1, 80), p.scaling = 1.5f;
    p.type = weight.type, p.effective_type = either(), p.threads = (int32_t)between(1, 3);
    const int64_t pieces = (out + p.piece - 1) / p.piece;
    const Exact made((size_t)(out * in) * (p.effective_type == F32 ? 4 : 2)), da((size_t)(pieces * rank * in) * 4), db((size_t)(out * rank) * 4);
    p.effective = made.data, p.da = (float *)da.data, p.db = (float *)db.data;
    effective(&p), gradients(&p);

    std::vector<double> want_a((size_t)(rank * in)), want_b((size_t)(out * rank));
    for (int64_t i = 0; i < out; i++) {
        for (int64_t j = 0; j < in; j++) {
            double want = 0;
            if (((uint8_t *)mask.data)[i * bytes + j / 8] >> j % 8 & 1) {
                const double g = weight[i * in + j];
                want = g;
                for (int64_t r = 0; r < rank; r++) {
                    want += 1.5 * b[i * stride + r] * a[r * in + j];
                    want_a[(size_t)(r * in + j)] += 1.5 * b[i * stride + r] * g;
                    want_b[(size_t)(i * rank + r)] += 1.5 * a[r * in + j] * g;
                }
            }
            const double got = read_float(made.data, p.effective_type, i * in + j);
            if (!(std::fabs(got - want) <= (p.effective_type == F32 ? 1e-4 : 1e-4 + std::fabs(want) / 256)))
                fail(name, seed, "effective weight " + std::to_string(got) + ", not " + std::to_string(want));
        }
    }
    for (int64_t k = 0; k < rank * in; k++) {
        double got = 0;
        for (int64_t piece = 0; piece < pieces; piece++) got += p.da[piece * rank * in + k];
        if (!(std::fabs(got - want_a[(size_t)k]) <= 1e-3)) fail(name, seed, "a gradient of A");
    }
    for (int64_t k = 0; k < out * rank; k++)
        if (!(std::fabs(p.db[k] - want_b[(size_t)k]) <= 1e-2)) fail(name, seed, "a gradient of B");
}

}  // namespace

int main(int count, char **arguments) {
    const double seconds = count > 1 ? atof(arguments[1]) : 10;
    uint64_t seed = count > 2 ? strtoull(arguments[2], nullptr, 10) : std::random_device()();
    std::vector<Kernel> kernels;
    const auto decode = [](void *plan) { return losa_decode_portable((Plan *)plan); };
    kernels.push_back({"portable", losa_multiply_portable, losa_expand_portable, decode, losa_form_portable, false});
#ifdef LOSA_FUZZ_EMULATED
    kernels.push_back({"avx512", losa_multiply_avx512, losa_expand_avx512, losa_decode_avx512, losa_form_avx512, false});
    kernels.push_back({"avx512-bf16", losa_multiply_avx512_bf16, losa_expand_avx512_bf16, losa_decode_avx512_bf16,
                       losa_form_avx512_bf16, true});
#else
    if (std::string(losa_features()).find("avx2 ") != std::string::npos)
        kernels.push_back({"avx2", losa_multiply_avx2, losa_expand_avx2, losa_decode_avx2, losa_form_avx2, false});
#endif
    const auto start = std::chrono::steady_clock::now();
    int64_t done = 0;
    do {
        for (const Kernel &kernel : kernels) one(kernel, seed), steps(kernel, seed);
#ifdef LOSA_FUZZ_EMULATED
        pairs("avx512", losa_effective_avx512, losa_gradients_avx512, seed);
#else
        if (kernels.size() > 1) pairs("avx2", losa_effective_avx2, losa_gradients_avx2, seed);
#endif
        seed++, done++;
    } while (std::chrono::duration<double>(std::chrono::steady_clock::now() - start).count() < seconds);
    for (const Kernel &kernel : kernels) printf("%s ", kernel.name);
    printf("passed on %lld random products, blocks and pairs; the next seed is %llu\n", (long long)done, (unsigned long long)seed);
    return 0;
}
