// The engine's arithmetic of short steps on a CPU, in one pass each where PyTorch needs ten; native.py compiles and calls it.
//
// T tokens, S sequences, H query heads, K key/value heads, d head width, b tokens per block: shapes are those of contract.py.
// Everything is computed in float32, whether numbers are stored as float or as bfloat16. Widths are multiples of 16, as
// native.py makes sure. No headers of PyTorch are needed, so this compiles in a second or two.

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <vector>

namespace {

typedef float Floats __attribute__((vector_size(64)));  // 16 numbers: one AVX-512 register, or several smaller ones

constexpr long MANY = 32;  // rows from which on a loop over rows is worth the threads

struct Bfloat16 {
    uint16_t bits;
};

inline float wide(float value) { return value; }

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

inline float sum(Floats values) {
    float parts[16], total = 0;
    memcpy(parts, &values, 64);
#pragma omp simd reduction(+ : total)
    for (int i = 0; i < 16; i++) total += parts[i];
    return total;
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

// `residual += x` if there is an x; then out = weight * residual / rms(residual), rounded where PyTorch's operators round.
template <class T>
void rms_norm(const T* x, T* residual, const T* weight, T* out, long rows, long width, float eps, int threads) {
#pragma omp parallel for num_threads(threads) if (rows >= MANY)
    for (long row = 0; row < rows; row++) {
        T* values = residual + row * width;
        if (x != nullptr)
            for (long i = 0; i < width; i++) values[i] = narrow<T>(wide(values[i]) + wide(x[row * width + i]));
        float total = 0;
#pragma omp simd reduction(+ : total)
        for (long i = 0; i < width; i++) total += wide(values[i]) * wide(values[i]);
        float scale = 1 / sqrtf(total / width + eps);
        for (long i = 0; i < width; i++)
            out[row * width + i] = narrow<T>(wide(weight[i]) * wide(narrow<T>(wide(values[i]) * scale)));
    }
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
    long width, int threads) {
#pragma omp parallel for num_threads(threads) if (tokens >= MANY)
    for (long token = 0; token < tokens; token++) {
        const T* from = qkv + token * (heads + 2 * kv_heads) * width;
        const T* c = cos == nullptr ? nullptr : cos + positions[token] * num_angles;
        const T* s = cos == nullptr ? nullptr : sin + positions[token] * num_angles;
        for (long head = 0; head < heads; head++)
            turn(from + head * width, q_norm, eps, c, s, width, q + (token * heads + head) * width);
        if (slots[token] < 0) continue;
        long place = slots[token] * kv_heads * width;
        const T* keys = from + heads * width;
        for (long head = 0; head < kv_heads; head++)
            turn(keys + head * width, k_norm, eps, c, s, width, k_cache + place + head * width);
        memcpy(v_cache + place, keys + kv_heads * width, kv_heads * width * sizeof(T));
    }
}

// Attention of one query of each sequence, over keys and values where they lie in the cache. One thread takes a sequence, or,
// where sequences are few, one key head of it. `known` is the head width if the compiler shall know it, else 0.
template <class T, int known>
void attend_heads(const Attention<T>& a, long row, long first, long last) {
    const long width = known ? known : a.width, group = a.heads / a.kv_heads, num = (last - first) * group;
    const long stop = a.contexts[row], start = a.window > 0 && stop > a.window ? stop - a.window : 0, count = stop - start;
    const long head = first * group, stride = a.kv_heads * width;
    std::vector<float> queries(num * width), totals(num * width), scores(num * count);
    for (long i = 0; i < num * width; i++) queries[i] = wide(a.q[(row * a.heads + head) * width + i]) * a.scale;
    // Calls `visit` with each position and where its numbers begin in a cache, and has those of the next block fetched meanwhile.
    auto walk = [&](const T* cache, auto visit) {
        const int32_t* table = a.tables + row * a.table_width;
        for (long at = start; at < stop;) {
            const long index = at / a.block, offset = at % a.block, end = std::min(at + a.block - offset, stop);
            const T* from = cache + (table[index] * a.block + offset) * stride + first * width;
            const T* next = end < stop ? cache + (table[index + 1] * a.block + offset) * stride + first * width : from;
            for (; at < end; at++, from += stride, next += stride) {
                for (long i = 0; i < (last - first) * width; i += 64 / long(sizeof(T))) __builtin_prefetch(next + i);
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
void attend(const Attention<T>& a, long rows, int threads) {
    const long part = rows < 2 * threads ? 1 : a.kv_heads, parts = a.kv_heads / part;
#pragma omp parallel for num_threads(threads) schedule(dynamic)
    for (long item = 0; item < rows * parts; item++) {
        const long row = item / parts, first = item % parts * part;
        if (a.width == 64) attend_heads<T, 64>(a, row, first, first + part);
        else if (a.width == 128) attend_heads<T, 128>(a, row, first, first + part);
        else attend_heads<T, 0>(a, row, first, first + part);
    }
}

template <class T>
void silu_mul(const T* gate_up, T* out, long rows, long width, int threads) {
#pragma omp parallel for num_threads(threads) if (rows >= MANY)
    for (long row = 0; row < rows; row++) {
        const T* gate = gate_up + 2 * row * width;
        for (long i = 0; i < width; i++) {
            float value = wide(gate[i]);
            value = wide(narrow<T>(value / (1 + exponential(-value))));
            out[row * width + i] = narrow<T>(value * wide(gate[i + width]));
        }
    }
}

// Four outputs of `num` rows of x: 8-bit weights are expanded once, piece by piece, into memory that stays in the first cache.
template <int num>
void four_outputs(const float* x, const int8_t* weight, long width, float out[4][4]) {
    constexpr long piece = 256;
    alignas(64) float expanded[4][piece];
    Floats totals[num][4] = {};
    for (long begin = 0; begin < width; begin += piece) {
        long count = width - begin < piece ? width - begin : piece;
        for (int j = 0; j < 4; j++)
            for (long i = 0; i < count; i++) expanded[j][i] = weight[j * width + begin + i];
        for (long i = 0; i < count; i += 16)
            for (int row = 0; row < num; row++) {
                Floats values, weights;
                memcpy(&values, x + row * width + begin + i, 64);
                for (int j = 0; j < 4; j++) {
                    memcpy(&weights, &expanded[j][i], 64);
                    totals[row][j] += values * weights;
                }
            }
    }
    for (int row = 0; row < num; row++)
        for (int j = 0; j < 4; j++) out[row][j] = sum(totals[row][j]);
}

}  // namespace

extern "C" void linear_int8(
    const float* x, const int8_t* weight, const float* scales, float* out, long rows, long width, long outputs, int threads) {
#pragma omp parallel for num_threads(threads)
    for (long group = 0; group < outputs; group += 4) {
        long first = group + 4 <= outputs ? group : outputs - 4;
        for (long row = 0; row < rows; row += 4) {
            const float* from = x + row * width;
            const int8_t* weights = weight + first * width;
            float part[4][4];
            long num = rows - row < 4 ? rows - row : 4;
            if (num == 1) four_outputs<1>(from, weights, width, part);
            else if (num == 2) four_outputs<2>(from, weights, width, part);
            else if (num == 3) four_outputs<3>(from, weights, width, part);
            else four_outputs<4>(from, weights, width, part);
            for (long i = 0; i < num; i++)
                for (int j = 0; j < 4; j++) out[(row + i) * outputs + first + j] = part[i][j] * scales[first + j];
        }
    }
}

#define FOR_NUMBERS_OF(T, name)                                                                                        \
    extern "C" void rms_norm_##name(                                                                                   \
        const T* x, T* residual, const T* weight, T* out, long rows, long width, float eps, int threads) {             \
        rms_norm(x, residual, weight, out, rows, width, eps, threads);                                                 \
    }                                                                                                                  \
    extern "C" void silu_mul_##name(const T* gate_up, T* out, long rows, long width, int threads) {                    \
        silu_mul(gate_up, out, rows, width, threads);                                                                  \
    }                                                                                                                  \
    extern "C" void rope_store_##name(                                                                                 \
        const T* qkv, const T* cos, const T* sin, long num_angles, const int64_t* positions, const int64_t* slots,     \
        const T* q_norm, const T* k_norm, float eps, T* q, T* k_cache, T* v_cache, long tokens, long heads,            \
        long kv_heads, long width, int threads) {                                                                      \
        rope_store(qkv, cos, sin, num_angles, positions, slots, q_norm, k_norm, eps, q, k_cache, v_cache, tokens,      \
                   heads, kv_heads, width, threads);                                                                   \
    }                                                                                                                  \
    extern "C" void attend_##name(                                                                                     \
        const T* q, const T* k_cache, const T* v_cache, const int32_t* tables, long table_width,                       \
        const int32_t* contexts, const float* alibi, float scale, long window, T* out, long rows, long heads,          \
        long kv_heads, long width, long block, int threads) {                                                          \
        attend<T>({q, k_cache, v_cache, tables, table_width, contexts, alibi, scale, window, out, heads, kv_heads,      \
                   width, block}, rows, threads);                                                                      \
    }

FOR_NUMBERS_OF(float, float32)
FOR_NUMBERS_OF(Bfloat16, bfloat16)
