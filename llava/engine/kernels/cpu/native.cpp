// The engine's arithmetic on a CPU, in one pass each where PyTorch needs ten. build.py compiles it, native.py
// calls it.
//
// Everything is computed in float32, whether numbers are stored as float, as bfloat16 or in 8 bits; shapes are those of
// engine/kernels/base.py. No headers of PyTorch are needed, so this compiles in two seconds.

#include <algorithm>
#include <array>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <utility>
#include <vector>

#include "native_threads.h"

namespace {

// LANES: numbers in one register. A vector wider than that goes through memory at every step, at a tenth of the speed.
// ROWS: rows of x that are multiplied by a panel at a time. SUMS: registers that hold sums at a time. FETCHES: whether it
// pays to ask for weights before they are needed (measured on an Intel with AVX-512, and an AMD without).
#if defined(__AVX512F__)
constexpr long LANES = 16, ROWS = 8, SUMS = 16;
constexpr bool FETCHES = true;
#elif defined(__AVX__)
constexpr long LANES = 8, ROWS = 6, SUMS = 12;
constexpr bool FETCHES = false;
#else
constexpr long LANES = 4, ROWS = 6, SUMS = 12;
constexpr bool FETCHES = false;
#endif

constexpr long PANEL = 32;    // outputs whose weights lie together; packing.py lays them out
constexpr long PIECE = 128;   // inputs of a panel that are expanded to float32 at a time: they stay in the first cache
constexpr long CHAINS = 8;    // sums that a processor can add to while it waits for others
constexpr long MANY = 32;     // tokens from which on a loop over them is worth the threads

typedef float Floats __attribute__((vector_size(4 * LANES)));

struct Bfloat16 {
    uint16_t bits;
};

inline float wide(float value) { return value; }

inline float wide(int8_t value) { return value; }

inline float wide(Bfloat16 value) {
    uint32_t bits = uint32_t(value.bits) << 16;
    float result;
    memcpy(&result, &bits, 4);
    return result;
}

template <class T>
T narrow(float value);

template <>
inline float narrow(float value) {
    return value;
}

template <>
inline Bfloat16 narrow(float value) {  // to the nearest, ties to even
    uint32_t bits;
    memcpy(&bits, &value, 4);
    uint32_t rounded = (bits + 0x7fff + (bits >> 16 & 1)) >> 16;
    return {uint16_t(value == value ? rounded : 0x7fc0)};
}

// Written without branches and calls, so that loops with it become vector instructions. Right to 2e-7 of its value.
inline float exponential(float x) {
    x = x < -87.0f ? -87.0f : (x > 88.0f ? 88.0f : x);
    float power = floorf(x * 1.44269504f + 0.5f);
    float rest = x - power * 0.693359375f + power * 2.12194440e-4f;
    float value = 1.9875691500e-4f;
    value = value * rest + 1.3981999507e-3f;
    value = value * rest + 8.3334519073e-3f;
    value = value * rest + 4.1665795894e-2f;
    value = value * rest + 1.6666665459e-1f;
    value = value * rest + 5.0000001201e-1f;
    value = value * rest * rest + rest + 1.0f;
    int32_t bits = (int32_t(power) + 127) << 23;
    float scale;
    memcpy(&scale, &bits, 4);
    return value * scale;
}

// Have memory brought into the cache while something else is computed. What lies beyond the end does no harm.
template <class T>
inline void fetch(const T* from, long count) {
    for (long i = 0; i < count; i += 64 / long(sizeof(T))) __builtin_prefetch(from + i);
}

template <class T>
struct Attention {
    const T *q, *k_cache, *v_cache;
    const int32_t* tables;
    long table_width;
    const int32_t* contexts;
    const float* alibi;
    float scale;
    long window;
    T* out;
    long heads, kv_heads, width, block;
};

// `residual += x` if there is an x; then out = weight * residual / rms(residual), rounded where PyTorch's operators do.
template <class T>
void rms_norm(const T* x, T* residual, const T* weight, T* out, long rows, long width, float eps, long num_threads) {
    threads().run(rows, rows < MANY ? 1 : num_threads, [&](long row) {
        T* values = residual + row * width;
        if (x != nullptr)
            for (long i = 0; i < width; i++) values[i] = narrow<T>(wide(values[i]) + wide(x[row * width + i]));
        float total = 0;
#pragma omp simd reduction(+ : total)
        for (long i = 0; i < width; i++) total += wide(values[i]) * wide(values[i]);
        float scale = 1 / sqrtf(total / width + eps);
        for (long i = 0; i < width; i++)
            out[row * width + i] = narrow<T>(wide(weight[i]) * wide(narrow<T>(wide(values[i]) * scale)));
    });
}

// One head's query or key: its norm, if there is one, and its rotation by the angles of a position, if there are any.
template <class T>
void turn(const T* from, const T* norm, float eps, const T* cos, const T* sin, long width, T* to) {
    if (norm != nullptr) {
        rms_norm(static_cast<const T*>(nullptr), const_cast<T*>(from), norm, to, 1, width, eps, 1);
        from = to;
    }
    if (cos == nullptr) {
        if (from != to) memcpy(to, from, width * sizeof(T));
        return;
    }
    long half = width / 2;
    for (long i = 0; i < half; i++) {
        float first = wide(from[i]), second = wide(from[i + half]), c = wide(cos[i]), s = wide(sin[i]);
        to[i] = narrow<T>(first * c - second * s);
        to[i + half] = narrow<T>(second * c + first * s);
    }
}

template <class T>
void rope_store(
    const T* qkv, const T* cos, const T* sin, long num_angles, const int64_t* positions, const int64_t* slots,
    const T* q_norm, const T* k_norm, float eps, T* q, T* k_cache, T* v_cache, long tokens, long heads, long kv_heads,
    long width, long num_threads) {
    threads().run(tokens, tokens < MANY ? 1 : num_threads, [&](long token) {
        const T* from = qkv + token * (heads + 2 * kv_heads) * width;
        const T* c = cos == nullptr ? nullptr : cos + positions[token] * num_angles;
        const T* s = cos == nullptr ? nullptr : sin + positions[token] * num_angles;
        for (long head = 0; head < heads; head++)
            turn(from + head * width, q_norm, eps, c, s, width, q + (token * heads + head) * width);
        if (slots[token] < 0) return;
        long place = slots[token] * kv_heads * width;
        const T* keys = from + heads * width;
        for (long head = 0; head < kv_heads; head++)
            turn(keys + head * width, k_norm, eps, c, s, width, k_cache + place + head * width);
        memcpy(v_cache + place, keys + kv_heads * width, kv_heads * width * sizeof(T));
    });
}

// Attention of one query of each sequence, over keys and values where they lie in the cache: the query heads of key
// heads `first` to `last` of sequence `row`. `known` is the head width if the compiler shall know it, else 0.
template <class T, int known>
void attend_heads(const Attention<T>& a, long row, long first, long last) {
    const long width = known ? known : a.width, group = a.heads / a.kv_heads, num = (last - first) * group;
    const long stop = a.contexts[row], start = a.window > 0 ? std::max(stop - a.window, 0L) : 0, count = stop - start;
    const long head = first * group, stride = a.kv_heads * width;
    std::vector<float> queries(num * width), totals(num * width), scores(num * count);
    for (long i = 0; i < num * width; i++) queries[i] = wide(a.q[(row * a.heads + head) * width + i]) * a.scale;
    // Calls `visit` with each position and where its numbers begin, and has those of the next block fetched meanwhile.
    auto walk = [&](const T* cache, auto visit) {
        const int32_t* table = a.tables + row * a.table_width;
        for (long at = start; at < stop;) {
            const long index = at / a.block, offset = at % a.block, end = std::min(at + a.block - offset, stop);
            const T* from = cache + (table[index] * a.block + offset) * stride + first * width;
            const T* next = end < stop ? cache + (table[index + 1] * a.block + offset) * stride + first * width : from;
            for (; at < end; at++, from += stride, next += stride) {
                fetch(next, (last - first) * width);
                visit(at - start, from);
            }
        }
    };
    walk(a.k_cache, [&](long at, const T* keys) {
        for (long h = 0; h < num; h++) {
            const T* key = keys + h / group * width;
            const float* query = &queries[h * width];
            float score = 0;
#pragma omp simd reduction(+ : score)
            for (long i = 0; i < width; i++) score += query[i] * wide(key[i]);
            scores[h * count + at] = score;
        }
    });
    for (long h = 0; h < num; h++) {
        float *weights = &scores[h * count], largest = -INFINITY, sum = 0;
        if (a.alibi != nullptr)
            for (long i = 0; i < count; i++) weights[i] -= a.alibi[head + h] * float(count - 1 - i);
#pragma omp simd reduction(max : largest)
        for (long i = 0; i < count; i++) largest = weights[i] > largest ? weights[i] : largest;
#pragma omp simd reduction(+ : sum)
        for (long i = 0; i < count; i++) sum += weights[i] = exponential(weights[i] - largest);
        for (long i = 0; i < count; i++) weights[i] /= sum;
    }
    walk(a.v_cache, [&](long at, const T* values) {
        for (long h = 0; h < num; h++) {
            const T* value = values + h / group * width;
            float *to = &totals[h * width], weight = scores[h * count + at];
            for (long i = 0; i < width; i++) to[i] += weight * wide(value[i]);
        }
    });
    for (long i = 0; i < num * width; i++) a.out[(row * a.heads + head) * width + i] = narrow<T>(totals[i]);
}

template <class T>
void attend(const Attention<T>& a, long rows, long num_threads) {
    const long part = rows < 2 * num_threads ? 1 : a.kv_heads, parts = a.kv_heads / part;
    threads().run(rows * parts, num_threads, [&](long item) {
        const long row = item / parts, first = item % parts * part;
        if (a.width == 64) attend_heads<T, 64>(a, row, first, first + part);
        else if (a.width == 128) attend_heads<T, 128>(a, row, first, first + part);
        else attend_heads<T, 0>(a, row, first, first + part);
    });
}

template <class T>
void silu_mul(const T* gate_up, T* out, long rows, long width, long num_threads) {
    threads().run(rows, rows < MANY ? 1 : num_threads, [&](long row) {
        const T* gate = gate_up + 2 * row * width;
        for (long i = 0; i < width; i++) {
            float value = wide(gate[i]);
            value = wide(narrow<T>(value / (1 + exponential(-value))));
            out[row * width + i] = narrow<T>(value * wide(gate[i + width]));
        }
    });
}

inline const float* expanded(const float* weights, long, float*) { return weights; }

template <class W>
inline const float* expanded(const W* weights, long count, float* out) {
    for (long i = 0; i < count; i++) out[i] = wide(weights[i]);
    return out;
}

using Sums = Floats[PANEL / LANES];

// totals (rows, at_once vectors) += one input of each row times its weights. Unrolled, or the totals would be in memory.
template <int rows, int at_once>
inline __attribute__((always_inline)) void add_product(
    const float* x, long width, const float* weights, Floats (*totals)[at_once]) {
    Floats values[at_once];
#pragma GCC unroll 8
    for (int vector = 0; vector < at_once; vector++) memcpy(&values[vector], weights + vector * LANES, sizeof(Floats));
#pragma GCC unroll 8
    for (int row = 0; row < rows; row++) {
        const float factor = x[row * width];
#pragma GCC unroll 8
        for (int vector = 0; vector < at_once; vector++) totals[row][vector] += factor * values[vector];
    }
}

// sums (rows, PANEL) += x (rows, count) times weights (count, PANEL), as many outputs at a time as there are registers for.
template <int rows>
inline void add_products(const float* x, long width, const float* weights, long count, Sums* sums) {
    constexpr int all = PANEL / LANES, at_once = rows * all <= SUMS ? all : 2;
    constexpr int parts = rows * at_once < CHAINS ? CHAINS / (rows * at_once) : 1;  // of the inputs, with sums of their own
    for (int from = 0; from < all; from += at_once) {
        Floats totals[parts][rows][at_once] = {};
        const float* at = weights + from * LANES;
        long i = 0;
        for (; i + parts <= count; i += parts)
#pragma GCC unroll 8
            for (int part = 0; part < parts; part++)
                add_product<rows, at_once>(x + i + part, width, at + (i + part) * PANEL, totals[part]);
        for (; i < count; i++) add_product<rows, at_once>(x + i, width, at + i * PANEL, totals[0]);
#pragma GCC unroll 8
        for (int part = 0; part < parts; part++)
#pragma GCC unroll 8
            for (int row = 0; row < rows; row++)
#pragma GCC unroll 8
                for (int vector = 0; vector < at_once; vector++) sums[row][from + vector] += totals[part][row][vector];
    }
}

using Adder = decltype(&add_products<1>);

template <int... numbers>
constexpr std::array<Adder, ROWS> adders_for(std::integer_sequence<int, numbers...>) {
    return {add_products<numbers + 1>...};
}

// x (rows, width) times weights in panels (outputs / PANEL, width, PANEL), the last filled up, times scales, if any.
template <class T, class W>
void linear(
    const float* x, const W* weights, const float* scales, T* out, long rows, long width, long outputs,
    long num_threads) {
    constexpr auto adders = adders_for(std::make_integer_sequence<int, ROWS>());
    threads().run((outputs + PANEL - 1) / PANEL, num_threads, [&](long panel) {
        const W* from = weights + panel * PANEL * width;
        const long first = panel * PANEL, num_outputs = std::min(outputs - first, PANEL);
        alignas(64) float buffer[PIECE * PANEL];
        for (long row = 0; row < rows; row += ROWS) {
            const long num = std::min(rows - row, ROWS);
            Sums sums[ROWS] = {};
            for (long begin = 0; begin < width; begin += PIECE) {
                const long count = std::min(width - begin, PIECE);
                const W* piece = from + begin * PANEL;
                if (FETCHES) fetch(piece + PIECE * PANEL, count * PANEL);
                adders[num - 1](x + row * width + begin, width, expanded(piece, count * PANEL, buffer), count, sums);
            }
            for (long i = 0; i < num; i++) {
                float values[PANEL];
                memcpy(values, sums[i], sizeof values);
                T* to = out + (row + i) * outputs + first;
                for (long j = 0; j < num_outputs; j++)
                    to[j] = narrow<T>(scales == nullptr ? values[j] : values[j] * scales[first + j]);
            }
        }
    });
}

}  // namespace

#define FOR_NUMBERS_OF(T, name)                                                                                        \
    extern "C" void rms_norm_##name(                                                                                   \
        const T* x, T* residual, const T* weight, T* out, long rows, long width, float eps, long num_threads) {        \
        rms_norm(x, residual, weight, out, rows, width, eps, num_threads);                                             \
    }                                                                                                                  \
    extern "C" void silu_mul_##name(const T* gate_up, T* out, long rows, long width, long num_threads) {               \
        silu_mul(gate_up, out, rows, width, num_threads);                                                              \
    }                                                                                                                  \
    extern "C" void rope_store_##name(                                                                                 \
        const T* qkv, const T* cos, const T* sin, long num_angles, const int64_t* positions, const int64_t* slots,     \
        const T* q_norm, const T* k_norm, float eps, T* q, T* k_cache, T* v_cache, long tokens, long heads,            \
        long kv_heads, long width, long num_threads) {                                                                 \
        rope_store(qkv, cos, sin, num_angles, positions, slots, q_norm, k_norm, eps, q, k_cache, v_cache, tokens,      \
                   heads, kv_heads, width, num_threads);                                                               \
    }                                                                                                                  \
    extern "C" void attend_##name(                                                                                     \
        const T* q, const T* k_cache, const T* v_cache, const int32_t* tables, long table_width,                       \
        const int32_t* contexts, const float* alibi, float scale, long window, T* out, long rows, long heads,          \
        long kv_heads, long width, long block, long num_threads) {                                                     \
        attend<T>({q, k_cache, v_cache, tables, table_width, contexts, alibi, scale, window, out, heads, kv_heads,     \
                   width, block}, rows, num_threads);                                                                  \
    }                                                                                                                  \
    extern "C" void linear_##name(                                                                                     \
        const float* x, const T* weights, T* out, long rows, long width, long outputs, long num_threads) {             \
        linear(x, weights, static_cast<const float*>(nullptr), out, rows, width, outputs, num_threads);                \
    }                                                                                                                  \
    extern "C" void linear_int8_##name(                                                                                \
        const float* x, const int8_t* weights, const float* scales, T* out, long rows, long width, long outputs,       \
        long num_threads) {                                                                                            \
        linear(x, weights, scales, out, rows, width, outputs, num_threads);                                            \
    }

FOR_NUMBERS_OF(float, float32)
FOR_NUMBERS_OF(Bfloat16, bfloat16)
