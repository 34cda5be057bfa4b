// docs/numerics.md, "Attention", as plain loops on the host: what swinq::attention() is judged
// against. The arguments are those of the kernels, with pointers to host memory; `bias` is not
// read.
#pragma once

#include <cuda_fp16.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <vector>

#include "attention.h"

namespace swinq {

// Element (token, part, head, channel) of qkv; part 0 is q, 1 k, 2 v.
inline double qkv_value(const AttentionArguments& a, int64_t token, int part, int head,
                        int channel) {
    const int64_t i = ((token * 3 + part) * a.heads + head) * kHeadDim + channel;
    if (a.type == Type::kInt8) return static_cast<const int8_t*>(a.qkv)[i];
    if (a.type == Type::kHalf) return __half2float(static_cast<const __half*>(a.qkv)[i]);
    return static_cast<const float*>(a.qkv)[i];
}

// Tokens of window (window_y, window_x) of an image, in the window's order, and their regions of
// the rolled map.
struct ReferenceWindow {
    std::vector<int64_t> tokens;
    std::vector<int> regions;

    ReferenceWindow(const AttentionArguments& a, int image, int window_y, int window_x) {
        const auto region = [&](int line) {
            if (a.shift == 0) return 0;
            return (line >= a.resolution - a.window) + (line >= a.resolution - a.shift);
        };
        for (int y = window_y * a.window; y < (window_y + 1) * a.window; ++y) {
            for (int x = window_x * a.window; x < (window_x + 1) * a.window; ++x) {
                const int map_y = (y + a.shift) % a.resolution;
                const int map_x = (x + a.shift) % a.resolution;
                tokens.push_back(
                    (static_cast<int64_t>(image) * a.resolution + map_y) * a.resolution + map_x);
                regions.push_back(region(y) * 3 + region(x));
            }
        }
    }
};

// One query of one head: o[32], in `Real` and with the roundings of the equations (kInt8: all;
// kHalf: p, only if `round_p`).
template <typename Real>
void reference_query(const AttentionArguments& a, const ReferenceWindow& window, int head,
                     int query, bool round_p, Real* o) {
    const int count = a.window * a.window, width = 2 * a.window - 1;
    std::vector<Real> s(count), p(count);
    Real top = -INFINITY;
    for (int key = 0; key < count; ++key) {
        Real dot = 0;
        for (int c = 0; c < kHeadDim; ++c) {
            dot += static_cast<Real>(qkv_value(a, window.tokens[query], 0, head, c)) *
                   static_cast<Real>(qkv_value(a, window.tokens[key], 1, head, c));
        }
        const int y = query / a.window - key / a.window, x = query % a.window - key % a.window;
        const int index = (y + a.window - 1) * width + x + a.window - 1;
        Real b = a.bias_table[static_cast<int64_t>(head) * width * width + index];
        b += window.regions[query] == window.regions[key] ? Real(0) : Real(-100);
        volatile Real product = dot * static_cast<Real>(a.factor[head]);  // no fma: two roundings
        s[key] = product + b;
        top = std::max(top, s[key]);
    }
    Real total = 0;
    for (int key = 0; key < count; ++key) {
        p[key] = std::exp(s[key] - top);
        if (a.type == Type::kInt8) p[key] = std::rint(Real(255) * p[key]);
        if (a.type == Type::kHalf && round_p) {
            p[key] = __half2float(__float2half_rn(static_cast<float>(p[key])));
        }
        total += p[key];
    }
    const Real scale = a.type == Type::kInt8 ? static_cast<Real>(a.v_scale) / total : Real(1);
    for (int c = 0; c < kHeadDim; ++c) {
        double exact = 0;  // of integers: exact; of halves: rounded once
        Real sum = 0;
        for (int key = 0; key < count; ++key) {
            const double v = qkv_value(a, window.tokens[key], 2, head, c);
            exact += static_cast<double>(p[key]) * v;
            sum += p[key] * static_cast<Real>(v);
        }
        o[c] = a.type == Type::kInt8 ? static_cast<Real>(exact) * scale : sum / total;
    }
}

// o before the output's rounding, (tokens, heads, 32). `Real` float with `round_p`: the equations;
// double without: the exact attention of fp16 and fp32 operands.
template <typename Real>
std::vector<Real> reference_attention(const AttentionArguments& a, bool round_p) {
    const int across = a.resolution / a.window;
    const int64_t tokens = static_cast<int64_t>(a.batch) * a.resolution * a.resolution;
    std::vector<Real> o(tokens * a.heads * kHeadDim);
    for (int i = 0; i < a.batch * across * across; ++i) {
        const int image = i / (across * across), place = i % (across * across);
        const ReferenceWindow window(a, image, place / across, place % across);
        for (int head = 0; head < a.heads; ++head) {
            for (int query = 0; query < a.window * a.window; ++query) {
                const int64_t row = window.tokens[query] * a.heads + head;
                reference_query(a, window, head, query, round_p, o.data() + row * kHeadDim);
            }
        }
    }
    return o;
}

// The codes of o (kInt8 outputs), (tokens, heads, 32).
inline std::vector<int8_t> reference_codes(const AttentionArguments& a,
                                           const std::vector<float>& o) {
    std::vector<int8_t> codes(o.size());
    for (size_t i = 0; i < o.size(); ++i) {
        const float x = std::rint(o[i] * a.out_inverse[i % (a.heads * kHeadDim)]);
        codes[i] = static_cast<int8_t>(std::min(std::max(x, -128.0f), 127.0f));
    }
    return codes;
}

}  // namespace swinq
