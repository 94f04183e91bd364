// One codebook's draw, as csm_kernels.sampling specifies it: the same noise, so the same token on every device.
#pragma once
#include <cstdint>
#include <vector>

namespace csm {

struct Draw {
    float temperature, top_p;
    int64_t top_k;
    bool do_sample;
    int64_t seed, utterance, frame;
    int32_t codebook;
};

// The token drawn from logits [vocab]; 0 and broken = true where they hold NaN or +infinity, or nothing but -infinity.
int64_t draw(const float* logits, int32_t vocab, const Draw& how, std::vector<float>& scratch, bool& broken);

}  // namespace csm
