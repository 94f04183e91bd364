#include "sample.h"

#include <algorithm>
#include <cmath>
#include <functional>
#include <limits>

namespace csm {
namespace {

// The first word of Philox-4x32-10.
uint32_t philox(uint32_t c0, uint32_t c1, uint32_t c2, uint32_t c3, uint64_t seed) {
    uint32_t k0 = uint32_t(seed), k1 = uint32_t(seed >> 32);
    for (int round = 0; round < 10; ++round) {
        const uint64_t a = 0xD2511F53ull * c0, b = 0xCD9E8D57ull * c2;
        c0 = uint32_t(b >> 32) ^ c1 ^ k0;
        c1 = uint32_t(b);
        c2 = uint32_t(a >> 32) ^ c3 ^ k1;
        c3 = uint32_t(a);
        k0 += 0x9E3779B9u;
        k1 += 0xBB67AE85u;
    }
    return c0;
}

float gumbel(int32_t token, const Draw& how) {
    const uint32_t word =
        philox(uint32_t(token), uint32_t(how.codebook), uint32_t(how.frame), uint32_t(how.utterance), uint64_t(how.seed));
    const float uniform = std::min((float(word) + 0.5f) * 0x1p-32f, 1.0f - 0x1p-24f);
    return -std::log(-std::log1p(-uniform));
}

// The least score that top-k and top-p leave; `ranked` is scratch.
float threshold(const std::vector<float>& scores, const Draw& how, std::vector<float>& ranked) {
    const size_t k = size_t(std::clamp<int64_t>(how.top_k, 1, int64_t(scores.size())));
    ranked = scores;
    std::nth_element(ranked.begin(), ranked.begin() + (k - 1), ranked.end(), std::greater<float>());
    const float least = ranked[k - 1];
    if (how.top_p >= 1.0f) return least;
    ranked.erase(std::remove_if(ranked.begin(), ranked.end(), [=](float score) { return score < least; }), ranked.end());
    std::sort(ranked.begin(), ranked.end(), std::greater<float>());
    std::vector<double> mass(ranked.size());
    double total = 0.0, before = 0.0;
    for (size_t i = 0; i < ranked.size(); ++i) total += mass[i] = std::exp(double(ranked[i]) - double(ranked[0]));
    size_t kept = 0;
    while (kept < ranked.size() && (kept == 0 || before < double(how.top_p) * total)) before += mass[kept++];
    return std::max(least, ranked[kept - 1]);
}

}  // namespace

int64_t draw(const float* logits, int32_t vocab, const Draw& how, std::vector<float>& scratch, bool& broken) {
    constexpr float infinity = std::numeric_limits<float>::infinity();
    int32_t best = 0;
    broken = false;
    for (int32_t i = 0; i < vocab; ++i) {
        broken = broken || !(logits[i] < infinity);
        if (logits[i] > logits[best]) best = i;
    }
    broken = broken || !(logits[best] > -infinity);
    if (broken) return 0;
    if (!how.do_sample) return best;
    std::vector<float> scores(logits, logits + vocab);
    for (float& score : scores) score /= how.temperature;
    const float least = threshold(scores, how, scratch);
    float top = -infinity;
    best = 0;
    for (int32_t i = 0; i < vocab; ++i) {
        if (scores[i] < least || scores[i] == -infinity) continue;
        const float noisy = scores[i] + gumbel(i, how);
        if (noisy > top) {
            top = noisy;
            best = i;
        }
    }
    return best;
}

}  // namespace csm
