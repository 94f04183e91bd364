// The kernels of one instruction set. Each is compiled from kernels.inc with that set's flags and chosen at run time.
#pragma once
#include <cstdint>

#include "csm_cpu.h"

namespace csm {

// Rows of x as a product wants them: fp32, for bf16 weights in the order their halves come apart; or int8 in groups.
struct Acts {
    float* wide;     // [m, padded]
    int8_t* narrow;  // [m, padded]
    float* scale;    // [m, groups]: of each group of `narrow`, and zeros
    float* sums;     // [m, groups]: the sum of each group's int8 values times its scale
    int32_t padded, groups;
};

constexpr int padded_columns(int cols) { return (cols + 127) / 128 * 128; }
constexpr int padded_groups(int groups) { return (groups + 15) / 16 * 16; }  // whole vectors of scales, zeros at the end

struct Isa {
    const char* name;
    void (*prepare)(const CsmMatrix& matrix, const float* x, int64_t x_stride, int m, Acts& out);
    // out[i * out_stride + n] for rows n in [from, to) and rows i of x in [0, m), without bias
    void (*product)(const CsmMatrix& matrix, const Acts& x, int m, int from, int to, float* out, int64_t out_stride);
    void (*swiglu)(float* gate, const float* up, int n);  // gate = silu(gate) * up
    void (*norm)(const float* x, const void* weight, int32_t format, float eps, int n, float* out);
    void (*narrow)(const float* from, int32_t format, int64_t first, int n, void* out);
    void (*add_row)(const CsmMatrix& table, int64_t row, float* out);
    // heads queries of one KV head over `length` cached positions; scores is scratch [heads, length]
    void (*attend)(const float* q, int heads, int dim, const void* keys, const void* values, int32_t format, int64_t length,
                   const uint8_t* allowed, float* scores, float* out);
};

// Null where not compiled in.
const Isa* isa_portable();
const Isa* isa_avx2();
const Isa* isa_avx2_vnni();
const Isa* isa_avx512();
const Isa* isa_by_name(const char* name);  // null or "" for the best; null where it is not to be had

}  // namespace csm
