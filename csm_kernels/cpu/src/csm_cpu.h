// The decode path of CSM on a CPU: what Python and the kernels agree on. Plain structs and C functions, so that the
// library depends on no version of torch, numpy or Python. Sizes in elements unless a name says bytes.
#pragma once
#include <cstdint>
#if defined(_WIN32)
#define CSM_API extern "C" __declspec(dllexport)
#else
#define CSM_API extern "C" __attribute__((visibility("default")))
#endif

#define CSM_ABI 2  // raised with every change of this file; Python refuses another

enum CsmFormat : int32_t { CSM_F32 = 0, CSM_BF16 = 1, CSM_F16 = 2, CSM_I8 = 3, CSM_I4 = 4, CSM_F8 = 5 };

// One weight matrix [rows, cols], row-major, as csm_kernels.quant stores it.
struct CsmMatrix {
    const void* data;
    const void* scale;  // I8, F8: fp32 [rows]. I4: bf16 [rows, groups] or, asymmetric, [rows, groups, 2]
    const void* bias;   // [rows] in bias_format, or null
    int64_t row_bytes;
    int32_t rows, cols;
    int32_t format, group, symmetric, bias_format;
};

struct CsmLayer {
    CsmMatrix q, k, v, o, gate, up, down;
    const void *input_norm, *post_norm;  // [hidden] in the stack's norm_format
    void *keys, *values;                 // [B, kv_heads, capacity, head_dim] in the stack's cache_format
};

struct CsmStack {
    const CsmLayer* layers;
    const void* norm;        // [hidden] in norm_format
    const float *cos, *sin;  // [positions, head_dim]
    int64_t capacity, positions;
    int32_t count, hidden, ffn, heads, kv_heads, head_dim, norm_format, cache_format;
    float eps;
};

struct CsmModel {
    CsmStack backbone, depth;
    CsmMatrix head, projection;  // codebook 0's head; backbone width to depth width
    CsmMatrix embedding;         // [codebooks * vocab, backbone width]
    CsmMatrix depth_embedding;   // [codebooks * depth_vocab, backbone width]
    const CsmMatrix* heads;      // codebooks - 1 of [depth_vocab, depth width]
    int32_t codebooks, vocab, depth_vocab;
};

struct CsmSampling {  // [B] each
    const float* temperature;
    const int64_t* top_k;
    const float* top_p;
    const uint8_t* do_sample;
};

// What changes from frame to frame: the tensors of csm_runtime.kv.State.
struct CsmState {
    float* hidden;                        // [B, backbone width]
    int64_t* codes;                       // [B, codebooks]
    int64_t *length, *position, *frame;   // [B]
    const int64_t *seed, *utterance;      // [B]
    uint8_t* allowed;                     // [B, capacity]
    uint8_t* ended;                       // [B]
    const int64_t *end_code, *judged, *pad_code;  // [1]
    const uint8_t* pads;                  // [1]
    int32_t* faults;                      // [1], bits: 2 not finite, 4 out of range
    float* first_logits;                  // [B, vocab]
    float* logits;                        // [codebooks - 1, B, depth_vocab]
    CsmSampling first, others;
    int32_t rows;
};

struct CsmSession;

CSM_API int32_t csm_abi();
CSM_API const char* csm_isas();        // instruction sets this machine can run, best first, comma-separated
CSM_API void csm_sizes(int64_t* out);  // bytes of matrix, layer, stack, model, state

// Everything pointed to must stay where it is until csm_free. Null where the instruction set is not to be had.
CSM_API CsmSession* csm_new(const CsmModel* model, const CsmState* state, int32_t threads, const char* isa);
CSM_API void csm_free(CsmSession* session);
CSM_API void csm_emit(CsmSession* session);     // all codebooks of a frame, from state.hidden into state.codes
CSM_API void csm_depth(CsmSession* session);    // the depth decode alone, from state.hidden and state.codes[:, 0]
CSM_API void csm_advance(CsmSession* session);  // state.codes into the backbone: the next state.hidden

// out [m, rows] = x [m, cols] times the matrix, transposed, plus its bias; 1 where the instruction set is not to be had.
CSM_API int32_t csm_gemv(const CsmMatrix* matrix, const float* x, float* out, int32_t m, int32_t threads, const char* isa);
// tokens [rows] from logits [rows, vocab]; broken rows give 0 and set flags[row].
CSM_API void csm_sample(const float* logits, int32_t rows, int32_t vocab, const CsmSampling* params, const int64_t* seed,
                        const int64_t* utterance, const int64_t* frame, int32_t codebook, int64_t* tokens, int32_t* flags);
// GB/s at which `bytes` of memory are read and added up, the best of rounds; 0 where there is no memory.
CSM_API double csm_stream(int64_t bytes, int32_t threads, int32_t rounds);
