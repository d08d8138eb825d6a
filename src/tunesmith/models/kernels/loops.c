/* Elementwise work on bf16, one pass over memory each; compiled for this processor by build.py.

bf16 is held as its 16 bits. Everything is computed in fp32 and rounded where it is written. Each function takes a stretch of its work,
[begin, end): numbers, rows, blocks of them, or matrices. Loops stand one after another over what stays in cache, each simple enough to take
many numbers at once. Sums alone may change their order (omp simd). A NaN goes through: it is never compared away. */

#include <math.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

typedef uint16_t bf16;
typedef int64_t count;

enum { BLOCK = 2048 };           /* numbers at once where there are no rows: what lies between two loops stays in the first cache */
enum { SUM_BLOCK = 1 << 16 };    /* numbers, and */
enum { ROW_BLOCK = 64 };         /* rows, that one sum is made of, whatever the number of threads */
static const float LEAST = -70, MOST = 80;   /* exponents: what is made of them are normal numbers, as fast as any other */
static const float SHIFT = 12582912;         /* 1.5 x 2^23: what is added to it is rounded to a whole number */
static const float UNSEEN = -3e38f;

static inline uint32_t bits_of(float x) { uint32_t b; memcpy(&b, &x, 4); return b; }
static inline float of_bits(uint32_t b) { float x; memcpy(&x, &b, 4); return x; }
static inline float wide(bf16 b) { return of_bits((uint32_t)b << 16); }

/* To the nearest bf16, halfway to the even one. A NaN stays one: those that come from bf16 numbers, or from no number, have no lower bits. */
static inline bf16 narrow(float x) {
    uint32_t b = bits_of(x);
    return (bf16)((b + 0x7FFF + ((b >> 16) & 1)) >> 16);
}

/* e^x to an fp32's last bits: 2^n times a polynomial of what is left (Cephes' expf). */
static inline float exponential(float x) {
    x = x < LEAST ? LEAST : x;
    x = x > MOST ? MOST : x;
    float shifted = x * 1.44269504f + SHIFT; /* its lowest bits are n */
    float n = shifted - SHIFT;
    float r = x - n * 0.693359375f;
    r = r + n * 2.12194440e-4f;
    float p = 1.9875691500e-4f;
    p = p * r + 1.3981999507e-3f;
    p = p * r + 8.3334519073e-3f;
    p = p * r + 4.1665795894e-2f;
    p = p * r + 1.6666665459e-1f;
    p = p * r + 5.0000001201e-1f;
    p = p * (r * r) + (r + 1);
    return of_bits(bits_of(p) + (bits_of(shifted) << 23));
}

/* An integer that is larger where the number is, and its own inverse; a NaN's is beyond all numbers, or below all. */
static inline int32_t ordered(float x) { int32_t b = (int32_t)bits_of(x); return b ^ ((b >> 31) & 0x7FFFFFFF); }
static inline float unordered(int32_t b) { return of_bits((uint32_t)(b ^ ((b >> 31) & 0x7FFFFFFF))); }

/* out[b]: the sum of the squares of block b of a's n numbers. */
void squares(const bf16 *a, count n, double *out, count begin, count end) {
    for (count b = begin; b < end; b++) {
        count from = b * SUM_BLOCK, to = from + SUM_BLOCK < n ? from + SUM_BLOCK : n;
        float total = 0;
#pragma omp simd reduction(+ : total)
        for (count i = from; i < to; i++) total += wide(a[i]) * wide(a[i]);
        out[b] = total;
    }
}

/* out = silu(gate) up. */
void swiglu(const bf16 *restrict gate, const bf16 *restrict up, bf16 *restrict out, count begin, count end) {
    for (count i = begin; i < end; i++) {
        float g = wide(gate[i]);
        out[i] = narrow(g / (1 + exponential(-g)) * wide(up[i]));
    }
}

/* What gate and up get; silu's derivative is s (1 + g (1 - s)), s the logistic function. */
void swiglu_backward(const bf16 *restrict grad, const bf16 *restrict gate, const bf16 *restrict up, bf16 *restrict d_gate,
                     bf16 *restrict d_up, count begin, count end) {
    for (count i = begin; i < end; i++) {
        float dy = wide(grad[i]), g = wide(gate[i]), u = wide(up[i]), s = 1 / (1 + exponential(-g));
        d_up[i] = narrow(dy * g * s);
        d_gate[i] = narrow(dy * u * s * (1 + g * (1 - s)));
    }
}

/* out[n, H] = x rstd w, rounded before w as the models do; rstd[n]. */
void rms_norm(const bf16 *x, const bf16 *restrict weight, float epsilon, count width, float *rstd, bf16 *out, count begin, count end) {
    for (count row = begin; row < end; row++) {
        const bf16 *restrict a = x + row * width;
        bf16 *restrict o = out + row * width;
        float total = 0;
#pragma omp simd reduction(+ : total)
        for (count i = 0; i < width; i++) total += wide(a[i]) * wide(a[i]);
        float r = rstd[row] = 1 / sqrtf(total / (float)width + epsilon);
        for (count i = 0; i < width; i++) o[i] = narrow(wide(narrow(wide(a[i]) * r)) * wide(weight[i]));
    }
}

/* d_x[n, H], and d_weight[b, H] that the rows of block b give. */
void rms_norm_backward(const bf16 *grad, const bf16 *x, const float *rstd, const bf16 *restrict weight, count rows, count width, bf16 *d_x,
                       float *d_weight, count begin, count end) {
    for (count b = begin; b < end; b++) {
        float *restrict dw = d_weight + b * width;
        count to = (b + 1) * ROW_BLOCK < rows ? (b + 1) * ROW_BLOCK : rows;
        memset(dw, 0, (size_t)width * sizeof(float));
        for (count row = b * ROW_BLOCK; row < to; row++) {
            const bf16 *restrict a = x + row * width, *restrict dy = grad + row * width;
            bf16 *restrict dx = d_x + row * width;
            float r = rstd[row], along = 0;
#pragma omp simd reduction(+ : along)
            for (count i = 0; i < width; i++) along += wide(dy[i]) * wide(weight[i]) * (wide(a[i]) * r);
            along /= -(float)width;
            for (count i = 0; i < width; i++) dw[i] += wide(dy[i]) * (wide(a[i]) * r);
            for (count i = 0; i < width; i++) dx[i] = narrow((wide(dy[i]) * wide(weight[i]) + wide(a[i]) * r * along) * r);
        }
    }
}

/* Of scale raw[n, V], the logits: log softmax at the target, the entropy if asked, and if asked d logprob / d raw in their place. */
void token_logprobs(bf16 *raw, const int64_t *targets, float scale, count vocabulary, float *logprobs, float *entropy, int want_entropy,
                    int want_slope, count begin, count end) {
    float *restrict e = malloc((size_t)vocabulary * sizeof(float));
    for (count row = begin; row < end; row++) {
        bf16 *restrict x = raw + row * vocabulary;
        int32_t highest = INT32_MIN;
#pragma omp simd reduction(max : highest)
        for (count i = 0; i < vocabulary; i++) { int32_t o = ordered(wide(x[i])); highest = o > highest ? o : highest; }
        float largest = unordered(highest), at_target = (wide(x[targets[row]]) - largest) * scale;
        double total = 0, below = 0;
        for (count from = 0; from < vocabulary; from += BLOCK) {
            count to = from + BLOCK < vocabulary ? from + BLOCK : vocabulary;
            float part = 0;
            for (count i = from; i < to; i++) e[i] = exponential((wide(x[i]) - largest) * scale);
#pragma omp simd reduction(+ : part)
            for (count i = from; i < to; i++) part += e[i];
            total += part;
            if (want_entropy) {
                part = 0;
#pragma omp simd reduction(+ : part)
                for (count i = from; i < to; i++) part += e[i] * ((wide(x[i]) - largest) * scale);
                below += part;
            }
        }
        logprobs[row] = (float)(at_target - log(total));
        if (want_entropy) entropy[row] = (float)(log(total) - below / total);
        if (want_slope) {
            float share = (float)(-1 / total), there = scale * (1 + e[targets[row]] * share);
            share *= scale;
            for (count i = 0; i < vocabulary; i++) x[i] = narrow(e[i] * share);
            x[targets[row]] = narrow(there);
        }
    }
    free(e);
}

/* What is added to the bits of the weight at a place before its lower half is cut off: train/masters.py says why. */
static inline uint32_t threshold(uint32_t place) { return place * 0x9E3779B1u >> 16; }

/* One AdamW step of masters whose upper halves, rounded from their thresholds, are bf16 weights, and whose lower halves are `lower`.
   A NaN stays one, whose bits a processor and CUDA set differently. rest1 and rest2 are 1 - beta, which fp32 would round. */
#define ADAMW(name, type, number)                                                                                                      \
    void name(bf16 *weight, uint16_t *lower, const type *grad, float *first, float *second, count place, float factor, float rate,     \
              float rest1, float beta2, float rest2, float epsilon, float decay, float correction1, float correction2, count begin,    \
              count end) {                                                                                                             \
        float master[BLOCK], keep = 1 - rate * decay, pace = rate / correction1;                                                       \
        for (count from = begin; from < end; from += BLOCK) {                                                                          \
            count n = end - from < BLOCK ? end - from : BLOCK;                                                                         \
            uint32_t at = (uint32_t)(place + from);                                                                                    \
            bf16 *restrict w = weight + from;                                                                                          \
            uint16_t *restrict low = lower + from;                                                                                     \
            const type *restrict g = grad + from;                                                                                      \
            float *restrict m = first + from, *restrict v = second + from;                                                             \
            for (count i = 0; i < n; i++) {                                                                                            \
                uint32_t carried = (low[i] + threshold(at + (uint32_t)i)) >> 16;                                                       \
                master[i] = of_bits((w[i] - carried) << 16 | low[i]);                                                                  \
            }                                                                                                                          \
            for (count i = 0; i < n; i++) {                                                                                            \
                float d = number(g[i]) * factor, a = m[i] + rest1 * (d - m[i]), b = beta2 * v[i] + rest2 * d * d;                      \
                m[i] = a;                                                                                                              \
                v[i] = b;                                                                                                              \
                master[i] = master[i] * keep - pace * a / (sqrtf(b) / correction2 + epsilon);                                          \
            }                                                                                                                          \
            for (count i = 0; i < n; i++) {                                                                                            \
                int32_t bits = (int32_t)bits_of(master[i]), most = bits < 0x7FFF0000 ? bits : 0x7FFF0000;                              \
                low[i] = (uint16_t)bits;                                                                                               \
                w[i] = (bf16)(((uint32_t)most + threshold(at + (uint32_t)i)) >> 16);                                                   \
            }                                                                                                                          \
        }                                                                                                                              \
    }
static inline float itself(float x) { return x; }
ADAMW(adamw_bf16, bf16, wide)
ADAMW(adamw_fp32, float, itself)

/* out[p, g, i] = x[head head_step + tokens[b, i] token_step], rows of `bytes`, of p = (kv, b) and head = (kv, g): kv heads apart. */
void gather(const char *x, count head_step, count token_step, const int64_t *tokens, count blocks, count n, count groups, count bytes,
            char *out, count begin, count end) {
    for (count part = begin; part < end; part++)
        for (count group = 0; group < groups; group++) {
            const char *head = x + (part / blocks * groups + group) * head_step * bytes;
            char *to = out + (part * groups + group) * n * bytes;
            for (count i = 0; i < n; i++) memcpy(to + i * bytes, head + tokens[part % blocks * n + i] * token_step * bytes, (size_t)bytes);
        }
}

/* The way back: what stands for a block's first real[b] tokens is put in their places. */
void scatter(const char *values, const int64_t *tokens, const int64_t *real, count blocks, count n, count groups, count bytes,
             count head_step, count token_step, char *out, count begin, count end) {
    for (count part = begin; part < end; part++)
        for (count group = 0; group < groups; group++) {
            char *head = out + (part / blocks * groups + group) * head_step * bytes;
            const char *from = values + (part * groups + group) * n * bytes;
            for (count i = 0; i < real[part % blocks]; i++)
                memcpy(head + tokens[part % blocks * n + i] * token_step * bytes, from + i * bytes, (size_t)bytes);
        }
}

/* out[kv, token] += values[(kv, b), i], of a block's first real[b] tokens, which other blocks may hold too. */
void add(const bf16 *values, const int64_t *tokens, const int64_t *real, count blocks, count n, count width, count all, float *out,
         count begin, count end) {
    for (count head = begin; head < end; head++)
        for (count b = 0; b < blocks; b++)
            for (count i = 0; i < real[b]; i++) {
                float *restrict to = out + (head * all + tokens[b * n + i]) * width;
                const bf16 *restrict from = values + ((head * blocks + b) * n + i) * width;
                for (count d = 0; d < width; d++) to[d] += wide(from[d]);
            }
}

/* Softmax of scale scores[(kv, b), (group, query), key] in their place; what a query does not see, and what is none, gets 0. Of a block, the
   last query sees the last key, the one before one fewer, and so on; window: how far back, 0 for all. Every row is gone over whole: loops as
   long as what is seen would cost more by what they guess wrong. */
void softmax(bf16 *scores, const int64_t *queries, const int64_t *keys, count blocks, count rows, count width, count groups, float scale,
             count window, count begin, count end) {
    float *restrict e = malloc((size_t)width * sizeof(float));
    int all = (int)width;
    for (count part = begin; part < end; part++) {
        count block = part % blocks, real = queries[block], n = rows / groups;
        for (count group = 0; group < groups; group++) {
            bf16 *lines = scores + (part * rows + group * n) * width;
            for (count query = 0; query < real; query++) {
                bf16 *restrict line = lines + query * width;
                int last = (int)(keys[block] - real + query), first = window > 0 && last >= window ? last - (int)window + 1 : 0;
                int32_t highest = INT32_MIN;
                for (int i = 0; i < all; i++) e[i] = i >= first && i <= last ? wide(line[i]) * scale : UNSEEN;
#pragma omp simd reduction(max : highest)
                for (int i = 0; i < all; i++) { int32_t o = ordered(e[i]); highest = o > highest ? o : highest; }
                float largest = unordered(highest), total = 0;
#pragma omp simd reduction(+ : total)
                for (int i = 0; i < all; i++) {
                    e[i] = i >= first && i <= last ? exponential(e[i] - largest) : 0;
                    total += e[i];
                }
                float share = 1 / total;
                for (int i = 0; i < all; i++) line[i] = narrow(e[i] * share);
            }
            memset(lines + real * width, 0, (size_t)((n - real) * width) * sizeof(bf16));
        }
    }
    free(e);
}

/* Attention of one token a row to the keys of its own slots, starts[b] up to the one before `used`, and to a shared prefix of `shared` keys,
   whose scores[kv, `lines` for (b, group), filled] are there and become their probabilities, for the values to be multiplied by. out[b, head, D]: what
   the row's own values give. Heads are (kv, group); keys and values[kv, b, slots, D]; window: how far back, 0 for all. */
void attend_step(const bf16 *query, const bf16 *keys, const bf16 *values, const int64_t *starts, count rows, count kv_heads, count groups,
                 count slots, count used, count width, count value_width, count shared, count lines, count filled, count window,
                 float scale, bf16 *scores, bf16 *out, count begin, count end) {
    float *e = malloc((size_t)(shared + used) * sizeof(float)), *restrict q = malloc((size_t)width * sizeof(float));
    float *restrict sum = malloc((size_t)value_width * sizeof(float));
    for (count part = begin; part < end; part++) {
        count kv = part / rows, b = part % rows, first = starts[b], before = 0, position = shared + used - 1 - first;
        if (window > 0 && used - window > first) first = used - window;
        if (window > 0 && position - window + 1 > 0) before = position - window + 1 < shared ? position - window + 1 : shared;
        count own = used - first, seen = shared - before + own;
        const bf16 *k = keys + (part * slots + first) * width, *v = values + (part * slots + first) * value_width;
        for (count group = 0; group < groups; group++) {
            const bf16 *restrict from = query + (b * kv_heads * groups + kv * groups + group) * width;
            bf16 *line = scores + (kv * lines + b * groups + group) * filled;
            for (count d = 0; d < width; d++) q[d] = wide(from[d]) * scale;
            for (count i = before; i < shared; i++) e[i - before] = wide(line[i]) * scale;
            for (count i = 0; i < own; i++) {
                const bf16 *restrict key = k + i * width;
                float dot = 0;
#pragma omp simd reduction(+ : dot)
                for (count d = 0; d < width; d++) dot += q[d] * wide(key[d]);
                e[shared - before + i] = dot;
            }
            int32_t highest = INT32_MIN;
#pragma omp simd reduction(max : highest)
            for (count i = 0; i < seen; i++) { int32_t o = ordered(e[i]); highest = o > highest ? o : highest; }
            float largest = unordered(highest), total = 0;
#pragma omp simd reduction(+ : total)
            for (count i = 0; i < seen; i++) {
                e[i] = exponential(e[i] - largest);
                total += e[i];
            }
            float share = 1 / total;
            for (count d = 0; d < value_width; d++) sum[d] = 0;
            for (count i = 0; i < own; i++) {
                const bf16 *restrict value = v + i * value_width;
                float weight = e[shared - before + i] * share;
                for (count d = 0; d < value_width; d++) sum[d] += weight * wide(value[d]);
            }
            bf16 *restrict to = out + (b * kv_heads * groups + kv * groups + group) * value_width;
            for (count d = 0; d < value_width; d++) to[d] = narrow(sum[d]);
            for (count i = 0; i < before; i++) line[i] = 0;
            for (count i = before; i < shared; i++) line[i] = narrow(e[i - before] * share);
            for (count i = shared; i < filled; i++) line[i] = 0;
        }
    }
    free(e);
    free(q);
    free(sum);
}
