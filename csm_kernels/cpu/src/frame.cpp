// A whole frame: what the threads do between two barriers, and the C functions of csm_cpu.h.
#include <string.h>

#include <algorithm>
#include <chrono>
#include <cmath>
#include <cstdlib>
#include <memory>
#include <new>
#include <string>
#include <vector>

#include "csm_cpu.h"
#include "isa.h"
#include "pool.h"
#include "sample.h"
#if defined(__x86_64__)
#include <cpuid.h>
#endif
#if defined(__linux__)
#include <sys/mman.h>
#endif

namespace csm {
namespace {

constexpr int kNotFinite = 2, kOutOfRange = 4;  // csm_runtime.kv.Fault
constexpr int kShare = 16;                      // rows of a matrix are dealt out in blocks: tails fall at the same rows

#if defined(__x86_64__)
bool has_avx2() { return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma"); }
bool has_avx_vnni() {
    unsigned a = 0, b = 0, c = 0, d = 0;
    return has_avx2() && __get_cpuid_count(7, 1, &a, &b, &c, &d) && (a >> 4 & 1);
}
bool has_avx512() {
    return has_avx2() && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
           __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512vnni");
}
#else
bool has_avx2() { return false; }
bool has_avx_vnni() { return false; }
bool has_avx512() { return false; }
#endif

std::vector<const Isa*> available() {
    std::vector<const Isa*> found;
    const auto offer = [&](const Isa* isa, bool supported) {
        if (isa && supported) found.push_back(isa);
    };
    offer(isa_avx512(), has_avx512());
    offer(isa_avx2_vnni(), has_avx_vnni());
    offer(isa_avx2(), has_avx2());
    offer(isa_portable(), true);
    return found;
}

template <class T>
class Buffer {  // on cache lines of its own
  public:
    Buffer() = default;
    explicit Buffer(int64_t count) : count_(std::max<int64_t>(count, 1)) {
        const size_t bytes = (sizeof(T) * size_t(count_) + 63) / 64 * 64;
        data_ = static_cast<T*>(::operator new(bytes, std::align_val_t(64)));
        memset(static_cast<void*>(data_), 0, bytes);
    }
    Buffer(Buffer&& other) noexcept : data_(other.data_), count_(other.count_) {
        other.data_ = nullptr;
        other.count_ = 0;
    }
    Buffer& operator=(Buffer&& other) noexcept {
        std::swap(data_, other.data_);
        std::swap(count_, other.count_);
        return *this;
    }
    ~Buffer() {
        if (data_) ::operator delete(static_cast<void*>(data_), std::align_val_t(64));
    }
    T* get() const { return data_; }
    int64_t bytes() const { return int64_t(sizeof(T)) * count_; }

  private:
    T* data_ = nullptr;
    int64_t count_ = 0;
};

struct Range {
    int from, to;
};

Range share(int n, int t, int threads) {
    const int64_t blocks = (n + kShare - 1) / kShare;
    const auto at = [&](int i) { return int(std::min<int64_t>(n, blocks * i / threads * kShare)); };
    return {at(t), at(t + 1)};
}

// What a thread has to itself.
struct Own {
    Buffer<float> normed, wide, scale, sums, scores;
    Buffer<int8_t> narrow;
    std::vector<float> scratch;
    Acts acts{};
    const float* input = nullptr;  // what `acts` was made of, and for which weights
    int32_t format = -1, group = 0;

    Own(int64_t rows, int64_t cols, int64_t scores_size)
        : normed(rows * cols), wide(rows * cols), scale(rows * padded_groups(int(cols / 32))),
          sums(rows * padded_groups(int(cols / 32))), scores(scores_size),
          narrow(rows * cols) {
        acts.wide = wide.get();
        acts.narrow = narrow.get();
        acts.scale = scale.get();
        acts.sums = sums.get();
    }
    bool holds(int64_t rows, int64_t cols) const {
        return wide.bytes() >= int64_t(sizeof(float)) * rows * cols &&
               scale.bytes() >= int64_t(sizeof(float)) * rows * padded_groups(int(cols / 32));
    }
};

// x in the form that a matrix wants; kept while matrices of one format follow each other on one input.
void form(const Isa& isa, Own& own, const CsmMatrix& matrix, const float* x, int64_t x_stride, int m) {
    if (own.input == x && own.format == matrix.format && own.group == matrix.group) return;
    own.acts.padded = padded_columns(matrix.cols);
    isa.prepare(matrix, x, x_stride, m, own.acts);
    own.input = x;
    own.format = matrix.format;
    own.group = matrix.group;
}

float bias_of(const CsmMatrix& matrix, int n) {
    if (matrix.bias_format == CSM_F32) return static_cast<const float*>(matrix.bias)[n];
    const uint16_t bits = static_cast<const uint16_t*>(matrix.bias)[n];
    if (matrix.bias_format == CSM_BF16) {
        const uint32_t wide = uint32_t(bits) << 16;
        float value;
        memcpy(&value, &wide, 4);
        return value;
    }
    _Float16 half;
    memcpy(&half, &bits, 2);
    return float(half);
}

void add_bias(const CsmMatrix& matrix, int m, Range rows, float* out, int64_t stride) {
    if (!matrix.bias) return;
    for (int n = rows.from; n < rows.to; ++n) {
        const float bias = bias_of(matrix, n);
        for (int i = 0; i < m; ++i) out[i * stride + n] += bias;
    }
}

}  // namespace

const Isa* isa_by_name(const char* name) {
    static const std::vector<const Isa*> found = available();
    if (!name || !*name) return found.front();
    for (const Isa* isa : found)
        if (!strcmp(isa->name, name)) return isa;
    return nullptr;
}

Pool& pool_of(int threads) {
    static std::mutex mutex;
    static auto& pools = *new std::vector<std::pair<int, Pool*>>;
    std::lock_guard<std::mutex> lock(mutex);
    for (auto& [count, pool] : pools) {
        if (count != threads) continue;
        if (pool->forked()) pool = new Pool(threads);
        return *pool;
    }
    pools.emplace_back(threads, new Pool(threads));
    return *pools.back().second;
}

}  // namespace csm

using namespace csm;

struct CsmSession {
    CsmModel model;
    CsmState state;
    std::vector<CsmLayer> backbone_layers, depth_layers;
    std::vector<CsmMatrix> heads;
    const Isa* isa;
    Pool* pool;
    int places;  // rows of a pass, at most: the depth decoder's first pass has two for each of the batch
    Buffer<float> x, q, k, v, attended, gate, up, embedded;
    Buffer<int64_t> tokens, slots, positions;
    Buffer<int32_t> flags;
    std::vector<std::unique_ptr<Own>> own;

    CsmSession(const CsmModel& m, const CsmState& s, int threads, const Isa* chosen)
        : model(m), state(s), backbone_layers(m.backbone.layers, m.backbone.layers + m.backbone.count),
          depth_layers(m.depth.layers, m.depth.layers + m.depth.count), heads(m.heads, m.heads + m.codebooks - 1),
          isa(chosen), pool(&pool_of(threads)), places(2 * s.rows) {
        model.backbone.layers = backbone_layers.data();
        model.depth.layers = depth_layers.data();
        model.heads = heads.data();
        int64_t hidden = 0, ffn = 0, query = 0, key = 0, scores = 0;
        for (const CsmStack* stack : {&model.backbone, &model.depth}) {
            hidden = std::max<int64_t>(hidden, stack->hidden);
            ffn = std::max<int64_t>(ffn, stack->ffn);
            query = std::max<int64_t>(query, int64_t(stack->heads) * stack->head_dim);
            key = std::max<int64_t>(key, int64_t(stack->kv_heads) * stack->head_dim);
            scores = std::max(scores, int64_t(stack->heads / stack->kv_heads) * stack->capacity);
        }
        const int64_t widest = padded_columns(int(std::max({hidden, ffn, query})));
        x = Buffer<float>(places * hidden);
        q = Buffer<float>(places * query);
        attended = Buffer<float>(places * query);
        k = Buffer<float>(places * key);
        v = Buffer<float>(places * key);
        gate = Buffer<float>(places * ffn);
        up = Buffer<float>(places * ffn);
        embedded = Buffer<float>(places * hidden);
        tokens = Buffer<int64_t>(s.rows);
        slots = Buffer<int64_t>(places);
        positions = Buffer<int64_t>(places);
        flags = Buffer<int32_t>(s.rows);
        for (int t = 0; t < threads; ++t) own.push_back(std::make_unique<Own>(places, widest, scores));
    }

    int threads() const { return pool->threads(); }

    // ---- what one thread does; every thread calls these in the same order

    // out rows of this thread's share of the matrix, plus bias; returns the share.
    Range multiply(int t, const CsmMatrix& matrix, const float* in, int64_t in_stride, int m, float* out, int64_t stride) {
        const Range rows = share(matrix.rows, t, threads());
        if (rows.from < rows.to) {
            form(*isa, *own[t], matrix, in, in_stride, m);
            isa->product(matrix, own[t]->acts, m, rows.from, rows.to, out, stride);
            add_bias(matrix, m, rows, out, stride);
        }
        return rows;
    }

    // The same, added to x; `embedded`, which nobody needs here, holds the product.
    void multiply_add(int t, const CsmMatrix& matrix, const float* in, int64_t in_stride, int m, int width) {
        const Range rows = share(matrix.rows, t, threads());
        float* product = embedded.get();
        multiply(t, matrix, in, in_stride, m, product, width);
        for (int i = 0; i < m; ++i)
            for (int n = rows.from; n < rows.to; ++n) x.get()[int64_t(i) * width + n] += product[int64_t(i) * width + n];
    }

    const float* normed(int t, const CsmStack& stack, const void* weight, int m) {
        Own& mine = *own[t];
        float* out = mine.normed.get();
        for (int i = 0; i < m; ++i) {
            const int64_t at = int64_t(i) * stack.hidden;
            isa->norm(x.get() + at, weight, stack.norm_format, stack.eps, stack.hidden, out + at);
        }
        mine.input = nullptr;  // its contents are new
        return out;
    }

    static void turn(float* head, const CsmStack& stack, int64_t position) {
        const int half = stack.head_dim / 2;
        const int64_t at = std::clamp<int64_t>(position, 0, stack.positions - 1) * stack.head_dim;
        const float *cos = stack.cos + at, *sin = stack.sin + at;
        for (int d = 0; d < half; ++d) {
            const float a = head[d], b = head[half + d];
            head[d] = a * cos[d] - b * sin[d];
            head[half + d] = b * cos[half + d] + a * sin[half + d];
        }
    }

    // All places of one row of the batch for one KV head, in order: places see those before them.
    void attend(int t, const CsmStack& stack, const CsmLayer& layer, int batch, int count, int kv, const uint8_t* allowed) {
        const int dim = stack.head_dim, group = stack.heads / stack.kv_heads;
        const int size = stack.cache_format == CSM_F32 ? 4 : 2;
        const int64_t cache = (int64_t(batch) * stack.kv_heads + kv) * stack.capacity * dim;
        char* keys = static_cast<char*>(layer.keys) + cache * size;
        char* values = static_cast<char*>(layer.values) + cache * size;
        for (int place = 0; place < count; ++place) {
            const int64_t i = int64_t(place) * state.rows + batch;
            const int64_t slot = slots.get()[i], position = positions.get()[i];
            float* key = k.get() + (i * stack.kv_heads + kv) * dim;
            turn(key, stack, position);
            isa->narrow(key, stack.cache_format, slot * dim, dim, keys);
            isa->narrow(v.get() + (i * stack.kv_heads + kv) * dim, stack.cache_format, slot * dim, dim, values);
            const int64_t head = (i * stack.heads + int64_t(kv) * group) * dim;
            for (int h = 0; h < group; ++h) turn(q.get() + head + int64_t(h) * dim, stack, position);
            isa->attend(q.get() + head, group, dim, keys, values, stack.cache_format, slot + 1, allowed,
                        own[t]->scores.get(), attended.get() + head);
        }
    }

    // One decoder layer for `count` places of every row; x in, x out. allowed [B, capacity] or null.
    void layer_step(int t, const CsmStack& stack, const CsmLayer& layer, int count, uint8_t* allowed) {
        const int m = count * state.rows, hidden = stack.hidden, ffn = stack.ffn;
        const int query = stack.heads * stack.head_dim, key = stack.kv_heads * stack.head_dim;
        const float* in = normed(t, stack, layer.input_norm, m);
        multiply(t, layer.q, in, hidden, m, q.get(), query);
        multiply(t, layer.k, in, hidden, m, k.get(), key);
        multiply(t, layer.v, in, hidden, m, v.get(), key);
        pool->barrier.wait();
        for (int item = t; item < state.rows * stack.kv_heads; item += threads()) {
            const int batch = item / stack.kv_heads;
            attend(t, stack, layer, batch, count, item % stack.kv_heads,
                   allowed ? allowed + batch * stack.capacity : nullptr);
        }
        pool->barrier.wait();
        own[t]->input = nullptr;
        multiply_add(t, layer.o, attended.get(), query, m, hidden);
        pool->barrier.wait();
        in = normed(t, stack, layer.post_norm, m);
        const Range mine = multiply(t, layer.gate, in, hidden, m, gate.get(), ffn);
        multiply(t, layer.up, in, hidden, m, up.get(), ffn);
        for (int i = 0; i < m; ++i) {
            const int64_t at = int64_t(i) * ffn + mine.from;
            isa->swiglu(gate.get() + at, up.get() + at, mine.to - mine.from);
        }
        pool->barrier.wait();
        own[t]->input = nullptr;
        multiply_add(t, layer.down, gate.get(), ffn, m, hidden);
        pool->barrier.wait();
    }

    // Rows of the batch are dealt out; tokens and flags of the frame so far.
    void sample(int t, const float* logits, int vocab, const CsmSampling& how, int codebook) {
        for (int b = t; b < state.rows; b += threads()) {
            const Draw draw_of{how.temperature[b], how.top_p[b],      how.top_k[b],    how.do_sample[b] != 0,
                               state.seed[b],      state.utterance[b], state.frame[b], codebook};
            bool broken = false;
            tokens.get()[b] = draw(logits + int64_t(b) * vocab, vocab, draw_of, own[t]->scratch, broken);
            flags.get()[b] |= broken;
            state.codes[int64_t(b) * model.codebooks + codebook] = tokens.get()[b];
        }
    }

    void first_codebook(int t) {
        own[t]->input = nullptr;
        multiply(t, model.head, state.hidden, model.backbone.hidden, state.rows, state.first_logits, model.vocab);
        pool->barrier.wait();
        sample(t, state.first_logits, model.vocab, state.first, 0);
        pool->barrier.wait();
    }

    // A code out of range has its fault already; here it must only not read beyond the table.
    void add_row(const CsmMatrix& table, int64_t row, float* out) const {
        isa->add_row(table, std::clamp<int64_t>(row, 0, table.rows - 1), out);
    }

    // The token of `book`, as the backbone embeds it, into `embedded` from row `first` on.
    void embed_token(int t, int book, int first) {
        const int width = model.backbone.hidden;
        for (int b = t; b < state.rows; b += threads()) {
            float* out = embedded.get() + int64_t(first + b) * width;
            memset(out, 0, sizeof(float) * width);
            add_row(model.depth_embedding, int64_t(book) * model.depth_vocab + tokens.get()[b], out);
        }
    }

    // Codebooks 1 and on from state.hidden and the tokens of codebook 0. Positions 0 and 1 are one pass.
    void depth_codebooks(int t) {
        const int rows = state.rows, width = model.backbone.hidden;
        const CsmStack& stack = model.depth;
        for (int p = 1; p < model.codebooks; ++p) {
            const int count = p == 1 ? 2 : 1, m = count * rows;
            for (int i = t; i < m; i += threads()) slots.get()[i] = positions.get()[i] = p - count + 1 + i / rows;
            if (p == 1)
                for (int b = t; b < rows; b += threads())
                    memcpy(embedded.get() + int64_t(b) * width, state.hidden + int64_t(b) * width, sizeof(float) * width);
            embed_token(t, p - 1, (count - 1) * rows);
            pool->barrier.wait();
            own[t]->input = nullptr;
            multiply(t, model.projection, embedded.get(), width, m, x.get(), stack.hidden);
            pool->barrier.wait();
            for (const CsmLayer& layer : depth_layers) layer_step(t, stack, layer, count, nullptr);
            float* logits = state.logits + int64_t(p - 1) * rows * model.depth_vocab;
            const float* last = normed(t, stack, stack.norm, m) + int64_t(m - rows) * stack.hidden;
            multiply(t, heads[p - 1], last, stack.hidden, rows, logits, model.depth_vocab);
            pool->barrier.wait();
            sample(t, logits, model.depth_vocab, state.others, p);
            // The rows that a thread samples are those it embeds: no barrier between.
        }
        pool->barrier.wait();
    }

    void finish() {
        for (int b = 0; b < state.rows; ++b) {
            int64_t* codes = state.codes + int64_t(b) * model.codebooks;
            for (int k = 0; k < model.codebooks; ++k)
                if (codes[k] < 0 || codes[k] >= (k ? model.depth_vocab : model.vocab)) *state.faults |= kOutOfRange;
            if (flags.get()[b]) *state.faults |= kNotFinite;
            if (*state.pads && state.ended[b]) std::fill(codes, codes + model.codebooks, *state.pad_code);
            const int judged = int(std::min<int64_t>(*state.judged, model.codebooks));
            if (std::all_of(codes, codes + judged, [&](int64_t code) { return code == *state.end_code; })) state.ended[b] = 1;
        }
    }

    // ---- calls

    void emit() {
        std::fill(flags.get(), flags.get() + state.rows, 0);
        pool->run([this](int t) {
            first_codebook(t);
            depth_codebooks(t);
        });
        finish();
    }

    void decode_depth() {
        std::fill(flags.get(), flags.get() + state.rows, 0);
        for (int b = 0; b < state.rows; ++b) tokens.get()[b] = state.codes[int64_t(b) * model.codebooks];
        pool->run([this](int t) { depth_codebooks(t); });
    }

    void advance_on(int t) {
        const CsmStack& stack = model.backbone;
        for (int b = t; b < state.rows; b += threads()) {
            float* out = x.get() + int64_t(b) * stack.hidden;
            memset(out, 0, sizeof(float) * stack.hidden);
            for (int k = 0; k < model.codebooks; ++k) {
                const int64_t code = state.codes[int64_t(b) * model.codebooks + k];
                add_row(model.embedding, int64_t(k) * model.vocab + code, out);
            }
            slots.get()[b] = state.length[b];
            positions.get()[b] = state.position[b];
            state.allowed[b * stack.capacity + state.length[b]] = 1;
        }
        pool->barrier.wait();
        for (const CsmLayer& layer : backbone_layers) layer_step(t, stack, layer, 1, state.allowed);
        for (int b = t; b < state.rows; b += threads())
            isa->norm(x.get() + int64_t(b) * stack.hidden, stack.norm, stack.norm_format, stack.eps, stack.hidden,
                      state.hidden + int64_t(b) * stack.hidden);
    }

    void advance() {
        for (int b = 0; b < state.rows; ++b)  // a full cache is the caller's fault, and not a reason to write beyond it
            if (state.length[b] < 0 || state.length[b] >= model.backbone.capacity) {
                *state.faults |= kOutOfRange;
                return;
            }
        pool->run([this](int t) { advance_on(t); });
        for (int b = 0; b < state.rows; ++b) {
            ++state.length[b];
            ++state.position[b];
            ++state.frame[b];
        }
    }
};

// A session outlives a fork: the child makes threads of its own before its first frame.
static void ensure_threads(CsmSession* session) {
    if (session->pool->forked()) session->pool = &pool_of(session->pool->threads());
}

int32_t csm_abi() { return CSM_ABI; }

const char* csm_isas() {
    static const std::string names = [] {
        std::string out;
        for (const Isa* isa : available()) out += (out.empty() ? "" : ",") + std::string(isa->name);
        return out;
    }();
    return names.c_str();
}

void csm_sizes(int64_t* out) {
    out[0] = sizeof(CsmMatrix);
    out[1] = sizeof(CsmLayer);
    out[2] = sizeof(CsmStack);
    out[3] = sizeof(CsmModel);
    out[4] = sizeof(CsmState);
}

CsmSession* csm_new(const CsmModel* model, const CsmState* state, int32_t threads, const char* name) {
    const Isa* isa = isa_by_name(name);
    if (!isa) return nullptr;
    try {
        return new CsmSession(*model, *state, std::max(threads, 1), isa);
    } catch (const std::exception&) {  // no memory, no thread to be had
        return nullptr;
    }
}

void csm_free(CsmSession* session) { delete session; }

void csm_emit(CsmSession* session) {
    ensure_threads(session);
    session->emit();
}

void csm_depth(CsmSession* session) {
    ensure_threads(session);
    session->decode_depth();
}

void csm_advance(CsmSession* session) {
    ensure_threads(session);
    session->advance();
}

int32_t csm_gemv(const CsmMatrix* matrix, const float* x, float* out, int32_t m, int32_t threads, const char* name) {
    const Isa* isa = isa_by_name(name);
    if (!isa) return 1;
    Pool& pool = pool_of(std::max(threads, 1));
    static std::mutex mutex;
    static std::vector<std::unique_ptr<Own>> all;  // kept: a product of microseconds should not wait for memory
    std::lock_guard<std::mutex> lock(mutex);
    const int64_t cols = padded_columns(matrix->cols);
    while (int(all.size()) < pool.threads()) all.push_back(nullptr);
    pool.run([&](int t) {
        if (!all[t] || !all[t]->holds(m, cols)) all[t] = std::make_unique<Own>(m, cols, 1);
        const Range rows = share(matrix->rows, t, pool.threads());
        if (rows.from >= rows.to) return;
        all[t]->input = nullptr;
        form(*isa, *all[t], *matrix, x, matrix->cols, m);
        isa->product(*matrix, all[t]->acts, m, rows.from, rows.to, out, matrix->rows);
        add_bias(*matrix, m, rows, out, matrix->rows);
    });
    return 0;
}

void csm_sample(const float* logits, int32_t rows, int32_t vocab, const CsmSampling* params, const int64_t* seed,
                const int64_t* utterance, const int64_t* frame, int32_t codebook, int64_t* tokens, int32_t* flags) {
    std::vector<float> scratch;
    for (int b = 0; b < rows; ++b) {
        const Draw how{params->temperature[b], params->top_p[b], params->top_k[b], params->do_sample[b] != 0,
                       seed[b],                utterance[b],     frame[b],         codebook};
        bool broken = false;
        tokens[b] = draw(logits + int64_t(b) * vocab, vocab, how, scratch, broken);
        flags[b] |= broken;
    }
}

double csm_stream(int64_t bytes, int32_t threads, int32_t rounds) {
    Pool& pool = pool_of(std::max(threads, 1));
    constexpr int64_t kPage = 1 << 21;  // huge pages, as the weights are in: half of the time goes to small ones otherwise
    bytes = (bytes + kPage - 1) / kPage * kPage;
    char* data = static_cast<char*>(::operator new(size_t(bytes), std::align_val_t(kPage), std::nothrow));
    if (!data) return 0.0;
#if defined(__linux__)
    madvise(data, size_t(bytes), MADV_HUGEPAGE);
#endif
    std::vector<Buffer<uint64_t>> sums;
    for (int t = 0; t < pool.threads(); ++t) sums.emplace_back(8);
    double best = 0.0;
    const int64_t lines = bytes / 64;
    for (int round = -1; round < rounds; ++round) {
        const auto start = std::chrono::steady_clock::now();
        pool.run([&](int t) {
            const int64_t from = lines * t / pool.threads() * 64, to = lines * (t + 1) / pool.threads() * 64;
            if (round < 0) {  // whose pages these are, and that they are there
                memset(data + from, t + 1, size_t(to - from));
                return;
            }
            uint64_t sum[8] = {};
            for (int64_t at = from; at < to; at += 64) {
                __builtin_prefetch(data + at + 2048);
                uint64_t words[8];
                memcpy(words, data + at, 64);
                for (int i = 0; i < 8; ++i) sum[i] += words[i];
            }
            memcpy(sums[t].get(), sum, sizeof(sum));
        });
        const double seconds = std::chrono::duration<double>(std::chrono::steady_clock::now() - start).count();
        if (round >= 0) best = std::max(best, double(bytes) / seconds / 1e9);
    }
    ::operator delete(data, std::align_val_t(kPage));
    return best;
}
