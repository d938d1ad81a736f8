// What a schedule shows: the cells that a window gathers, and the masks over them and over the whole cache
//
// Relies on, of llama.cpp:
//   - llama_kv_cells::seq_pos_get(), the positions of a sequence in order, each with its cell
//   - llama_ubatch: the tokens of a stream lie together, and so does each stream's share of them; seq_id[i][0] is a sequence
//     that token i is in
//   - the cells of one stream of llama_kv_cache follow those of the one before it (get_stream(), get_size())
//   - llama_kv_cache::set_input_kq_mask(), whose values for causal attention the two parts of the mask here add up to
//   - ggml_repeat() and ggml_cpy() into a view of its output: the same buffer, in that order, on one device

#include "llama-swaa-mask.h"

#include "llama-batch.h"
#include "llama-impl.h"
#include "llama-kv-cache.h"
#include "llama-model.h"
#include "llama-swaa.h"

#include "ggml-cpp.h"

#include <algorithm>
#include <cmath>
#include <limits>
#include <map>

// small enough to see little more than the window, large enough for the gathered cells to be used often
static constexpr uint32_t LLAMA_SWAA_N_BLOCK = 512;

// with fewer tokens, the mask is small
static constexpr uint32_t LLAMA_SWAA_N_SHARE_MIN = 32;

static constexpr uint32_t LLAMA_SWAA_N_TAIL_PAD = 256;

// call f with the data of a mask, the value of a visible cell and that of another
template<typename F>
static void llama_swaa_fill(ggml_tensor * dst, F f) {
    GGML_ASSERT(ggml_backend_buffer_is_host(dst->buffer));
    GGML_ASSERT(ggml_is_contiguous(dst));

    if (dst->type == GGML_TYPE_F16) {
        f((ggml_fp16_t *) dst->data, llama_cast<ggml_fp16_t>(0.0f), llama_cast<ggml_fp16_t>(-INFINITY));
    } else {
        f((float *) dst->data, 0.0f, -INFINITY);
    }
}

uint32_t llama_swaa_n_stream(const llama_kv_cache & kv, const llama_ubatch & ubatch) {
    return kv.get_n_stream() == 1 ? 1 : ubatch.n_seqs_unq;
}

//
// llama_swaa_window
//

llama_swaa_window::llama_swaa_window(const llama_kv_cache & kv, const llama_swaa_schedule & schedule, const llama_ubatch & ubatch) :
    kv(kv), window(schedule.window), n_sink(schedule.n_sink) {
    const uint32_t n_stream = llama_swaa_n_stream(kv, ubatch);
    const uint32_t n_blocks = n_stream*n_block(ubatch.n_tokens/n_stream);
    const uint32_t n_tpb    = ubatch.n_tokens/n_blocks;

    for (uint32_t b = 0; b < n_blocks; ++b) {
        // the positions of each sequence of the block
        std::map<llama_seq_id, std::pair<llama_pos, llama_pos>> range;

        for (uint32_t i = b*n_tpb; i < (b + 1)*n_tpb; ++i) {
            const llama_pos pos = ubatch.pos[i];

            const auto it = range.try_emplace(ubatch.seq_id[i][0], pos, pos).first;

            it->second.first  = std::min(it->second.first,  pos);
            it->second.second = std::max(it->second.second, pos);
        }

        block cur = { range.begin()->first, range.size() > 1, {}, {} };

        const auto & cells = kv.get_cells(cur.seq_id);

        std::vector<std::pair<llama_pos, uint32_t>> found;

        for (const auto & [seq_id, minmax] : range) {
            const auto & seq_pos = cells.seq_pos_get(seq_id);

            for (auto it = seq_pos.begin(); it != seq_pos.end() && it->first < n_sink && it->first <= minmax.second; ++it) {
                found.push_back(*it);
            }

            const llama_pos p0 = std::max(n_sink, minmax.first - window + 1);

            for (auto it = seq_pos.lower_bound({ p0, 0 }); it != seq_pos.end() && it->first <= minmax.second; ++it) {
                found.push_back(*it);
            }
        }

        if (cur.mixed) {
            std::sort(found.begin(), found.end());
            found.erase(std::unique(found.begin(), found.end()), found.end());
        }

        for (const auto & [pos, cell] : found) {
            cur.cells.push_back(cell);
            cur.pos  .push_back(pos);
        }

        blocks.push_back(std::move(cur));
    }
}

uint32_t llama_swaa_window::n_block(uint32_t n_tps) {
    for (uint32_t n = (n_tps + LLAMA_SWAA_N_BLOCK - 1)/LLAMA_SWAA_N_BLOCK; n*LLAMA_SWAA_N_BLOCK/2 <= n_tps; ++n) {
        if (n_tps % n == 0) {
            return n;
        }
    }

    // no divisor will do, as with a prime: one block, which is right and a little slower
    return 1;
}

uint32_t llama_swaa_window::size() const {
    size_t res = 0;
    for (const auto & b : blocks) {
        res = std::max(res, b.cells.size());
    }
    return res;
}

void llama_swaa_window::set_input_idxs(ggml_tensor * dst) const {
    GGML_ASSERT(ggml_backend_buffer_is_host(dst->buffer));

    const size_t n_gather = dst->ne[0]/blocks.size();

    int32_t * data = (int32_t *) dst->data;

    for (const auto & b : blocks) {
        const int32_t offs = kv.get_stream(b.seq_id)*kv.get_size();

        // the padding is masked, any cell will do
        for (size_t j = 0; j < n_gather; ++j) {
            *data++ = offs + (j < b.cells.size() ? b.cells[j] : 0);
        }
    }
}

void llama_swaa_window::set_input_mask(ggml_tensor * dst, const llama_ubatch & ubatch, bool gather) const {
    const int64_t  n     = dst->ne[0];
    const uint32_t n_tpb = ubatch.n_tokens/blocks.size();

    llama_swaa_fill(dst, [&](auto * data, auto keep, auto drop) {
        std::fill(data, data + n*ubatch.n_tokens, drop);

        for (uint32_t i = 0; i < ubatch.n_tokens; ++i) {
            const auto & b     = blocks[i/n_tpb];
            const auto & cells = kv.get_cells(b.seq_id);

            const llama_pos    pos    = ubatch.pos[i];
            const llama_seq_id seq_id = ubatch.seq_id[i][0];

            auto * row = data + n*i;

            // the cells with a position in [p0, p1]
            const auto show = [&](llama_pos p0, llama_pos p1) {
                const size_t j0 = std::lower_bound(b.pos.begin(), b.pos.end(), p0) - b.pos.begin();
                const size_t j1 = std::upper_bound(b.pos.begin(), b.pos.end(), p1) - b.pos.begin();

                for (size_t j = j0; j < j1; ++j) {
                    if (!b.mixed || cells.seq_has(b.cells[j], seq_id)) {
                        row[gather ? j : b.cells[j]] = keep;
                    }
                }
            };

            show(0, std::min(n_sink - 1, pos));
            show(std::max(n_sink, pos - window + 1), pos);
        }
    });
}

//
// the causal mask
//

// the causal mask is made by two ops, of which the second writes into the output of the first: they have to run on one device
bool llama_swaa_can_make_mask(const llama_model & model) {
    ggml_init_params params = {
        /*.mem_size   =*/ 8*ggml_tensor_overhead(),
        /*.mem_buffer =*/ NULL,
        /*.no_alloc   =*/ true,
    };
    ggml_context_ptr ctx { ggml_init(params) };

    ggml_tensor * row  = ggml_new_tensor_2d(ctx.get(), GGML_TYPE_F16, 512, 1);
    ggml_tensor * tail = ggml_new_tensor_2d(ctx.get(), GGML_TYPE_F16, 256, 32);
    ggml_tensor * mask = ggml_repeat_4d(ctx.get(), row, 512, 32, 1, 1);
    ggml_tensor * made = ggml_cpy(ctx.get(), tail, ggml_view_2d(ctx.get(), mask, 256, 32, mask->nb[1], 256*mask->nb[0]));

    for (uint32_t il = 0; il < model.hparams.n_layer(); ++il) {
        ggml_backend_dev_t dev = model.dev_layer(il);

        if (dev && !(ggml_backend_dev_supports_op(dev, mask) && ggml_backend_dev_supports_op(dev, made))) {
            return false;
        }
    }

    return true;
}

uint32_t llama_swaa_n_tail(uint32_t n_tps, uint32_t n_kv) {
    // the cells of the ubatch and those up to the end of n_kv, which is padded
    const uint32_t res = GGML_PAD(n_tps, LLAMA_SWAA_N_TAIL_PAD) + LLAMA_SWAA_N_TAIL_PAD;

    return n_tps >= LLAMA_SWAA_N_SHARE_MIN && res < n_kv ? res : 0;
}

// call f for each stream of the ubatch with its index, its cells and its tokens [i0, i1)
template<typename F>
static void llama_swaa_each_stream(const llama_kv_cache & kv, const llama_ubatch & ubatch, F f) {
    const uint32_t n_stream = llama_swaa_n_stream(kv, ubatch);
    const uint32_t n_tps    = ubatch.n_tokens/n_stream;

    for (uint32_t s = 0; s < n_stream; ++s) {
        f(s, kv.get_cells(ubatch.seq_id[s*n_tps][0]), s*n_tps, (s + 1)*n_tps);
    }
}

bool llama_swaa_can_share(const llama_kv_cache & kv, const llama_ubatch & ubatch, uint32_t n_kv, uint32_t n_tail) {
    bool res = true;

    llama_swaa_each_stream(kv, ubatch, [&](uint32_t, const llama_kv_cells & cells, uint32_t i0, uint32_t i1) {
        const llama_seq_id seq_id = ubatch.seq_id[i0][0];

        const auto minmax = std::minmax_element(ubatch.pos + i0, ubatch.pos + i1);

        for (uint32_t i = i0; i < i1; ++i) {
            res = res && ubatch.seq_id[i][0] == seq_id;
        }

        // a position that only some of the tokens can see
        const auto & seq_pos = cells.seq_pos_get(seq_id);

        for (auto it = seq_pos.upper_bound({ *minmax.first, std::numeric_limits<uint32_t>::max() }); res && it != seq_pos.end() && it->first <= *minmax.second; ++it) {
            res = it->second >= n_kv - n_tail;
        }
    });

    return res;
}

void llama_swaa_set_input_shared(ggml_tensor * dst, const llama_kv_cache & kv, const llama_ubatch & ubatch) {
    const int64_t n_kv = dst->ne[0];

    llama_swaa_fill(dst, [&](auto * data, auto keep, auto drop) {
        llama_swaa_each_stream(kv, ubatch, [&](uint32_t s, const llama_kv_cells & cells, uint32_t i0, uint32_t i1) {
            const llama_seq_id seq_id  = ubatch.seq_id[i0][0];
            const llama_pos    pos_min = *std::min_element(ubatch.pos + i0, ubatch.pos + i1);

            for (int64_t j = 0; j < n_kv; ++j) {
                const bool show = !cells.is_empty(j) && cells.seq_has(j, seq_id) && cells.pos_get(j) <= pos_min;

                data[n_kv*s + j] = show ? keep : drop;
            }
        });
    });
}

void llama_swaa_set_input_tail(ggml_tensor * dst, const llama_kv_cache & kv, const llama_ubatch & ubatch, uint32_t n_kv) {
    const int64_t n_tail = dst->ne[0];

    llama_swaa_fill(dst, [&](auto * data, auto keep, auto drop) {
        llama_swaa_each_stream(kv, ubatch, [&](uint32_t, const llama_kv_cells & cells, uint32_t i0, uint32_t i1) {
            const llama_seq_id seq_id = ubatch.seq_id[i0][0];

            std::vector<llama_pos> pos(n_tail, std::numeric_limits<llama_pos>::max());

            for (int64_t j = 0; j < n_tail; ++j) {
                const uint32_t cell = n_kv - n_tail + j;

                if (!cells.is_empty(cell) && cells.seq_has(cell, seq_id)) {
                    pos[j] = cells.pos_get(cell);
                }
            }

            for (uint32_t i = i0; i < i1; ++i) {
                for (int64_t j = 0; j < n_tail; ++j) {
                    data[n_tail*i + j] = pos[j] <= ubatch.pos[i] ? keep : drop;
                }
            }
        });
    });
}
