// What is no instruction set's own: what the processor has, and threads.
#include "losa.h"

#include <dlfcn.h>
#include <string>
#include <system_error>
#include <thread>
#include <unistd.h>
#include <vector>

#if defined(__x86_64__)
#include <cpuid.h>
#endif

namespace {

struct Job {
    Queues queues;
    int64_t arrived;
    int64_t count, step;
    int32_t threads;
    void (*body)(void *, int64_t, int64_t);
    void *context;
};

void work(void *shared) {
    Job &job = *(Job *)shared;
    int64_t mine = __atomic_fetch_add(&job.arrived, 1, __ATOMIC_RELAXED);
    for (int64_t piece; (piece = take(job.queues, (job.count + job.step - 1) / job.step, job.threads, mine)) >= 0;) {
        const int64_t begin = piece * job.step, end = begin + job.step;
        job.body(job.context, begin, end < job.count ? end : job.count);
    }
}

typedef void (*GompParallel)(void (*)(void *), void *, unsigned, unsigned);

struct Sums {
    const Matrix *weight;
    int16_t *sums;
};

void sum_range(void *context, int64_t begin, int64_t end) {
    const Sums &s = *(const Sums *)context;
    const Matrix &w = *s.weight;
    const int64_t bytes = (w.in + 7) / 8, groups = (w.in + GROUP - 1) / GROUP;
    for (int64_t row = begin; row < end; row++) {
        const int8_t *values = (const int8_t *)w.values + first_value(w, row);
        for (int64_t g = 0; g < groups; g++) {
            const int64_t last = (g + 1) * (GROUP / 8) < bytes ? (g + 1) * (GROUP / 8) : bytes;
            int64_t count = 0;
            for (int64_t byte = g * (GROUP / 8); byte < last; byte += 8)
                count += __builtin_popcountll(mask_word(w.mask + row * bytes, byte, last));
            int32_t sum = 0;
            for (int64_t i = 0; i < count; i++) sum += values[i];
            s.sums[row * groups + g] = (int16_t)sum;
            values += count;
        }
    }
}

const pid_t loaded_by = getpid();

// torch's own threads, through the OpenMP library that it has loaded: threads of ours would fight with them for the
// processors, since they spin for a while after each of torch's operations. They do not outlive a fork.
GompParallel torch_threads() {
    static const GompParallel found = (GompParallel)dlsym(RTLD_DEFAULT, "GOMP_parallel");
    return loaded_by == getpid() ? found : nullptr;
}

}  // namespace

extern "C" void losa_parallel(int64_t count, int64_t step, int32_t threads, void (*body)(void *, int64_t, int64_t), void *context) {
    const int64_t needed = (count + step - 1) / step;
    if (threads > needed) threads = (int32_t)needed;
    if (threads < 1) threads = 1;
    Job job = {{}, 0, count, step, threads, body, context};
    if (threads == 1) {
        work(&job);
    } else if (const GompParallel parallel = torch_threads()) {
        parallel(work, &job, (unsigned)threads, 0);
    } else {
        std::vector<std::thread> others;
        try {
            for (int32_t i = 1; i < threads; i++) others.emplace_back(work, &job);
        } catch (const std::system_error &) {  // no more threads to be had: those there are do it all
        }
        work(&job);
        for (std::thread &other : others) other.join();
    }
}

// Matrix.sums of int8 values.
extern "C" void losa_sums(const Matrix *weight, int16_t *sums, int32_t threads) {
    Sums s = {weight, sums};
    losa_parallel(weight->out, 16, threads, sum_range, &s);
}

// Names of what the kernels ask for that this processor (and its operating system) has, with blanks between.
extern "C" const char *losa_features(void) {
    static const std::string found = [] {
        std::string names;
#if defined(__x86_64__)
        __builtin_cpu_init();
        const auto add = [&](const char *name, bool has) { names += has ? std::string(name) + " " : ""; };
        unsigned a = 0, b = 0, c = 0, d = 0;
        add("avx2", __builtin_cpu_supports("avx2"));
        add("fma", __builtin_cpu_supports("fma"));
        add("bmi2", __builtin_cpu_supports("bmi2"));
        add("popcnt", __builtin_cpu_supports("popcnt"));
        add("f16c", __get_cpuid(1, &a, &b, &c, &d) && (c >> 29 & 1));
        add("avx512f", __builtin_cpu_supports("avx512f"));
        add("avx512bw", __builtin_cpu_supports("avx512bw"));
        add("avx512vl", __builtin_cpu_supports("avx512vl"));
        add("avx512dq", __builtin_cpu_supports("avx512dq"));
        add("avx512_vbmi2", __builtin_cpu_supports("avx512vbmi2"));
        add("avx512_vnni", __builtin_cpu_supports("avx512vnni"));
        // __builtin_cpu_supports knows it by different names in different compilers
        add("avx512_bf16", __builtin_cpu_supports("avx512bw") && __get_cpuid_count(7, 1, &a, &b, &c, &d) && (a >> 5 & 1));
#endif
        return names;
    }();
    return found.c_str();
}
