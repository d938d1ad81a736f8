// Drafts of the target model itself, see speculative-window.h
//
// Relies on, of llama.cpp: the C interface (llama_model_swaa_set_draft(), llama_swaa_set_draft_start()), and that a clone of a
// common_sampler draws the random numbers that the sampler will draw.

#include "speculative-window.h"

#include "log.h"

#include <algorithm>
#include <stdexcept>

// the first tokens take attention that has no other place to go; few are enough
static constexpr int32_t COMMON_WINDOW_N_SINK = 32;

static int32_t common_speculative_window_n_sink(const common_params_speculative_window & params) {
    return std::min(COMMON_WINDOW_N_SINK, params.size/8);
}

void common_speculative_window_init(llama_model * model, const common_params_speculative_window & params) {
    const int32_t n_sink = common_speculative_window_n_sink(params);

    if (llama_model_swaa_set_draft(model, params.size - n_sink, n_sink) != 0) {
        throw std::runtime_error("the model cannot draft through a window");
    }
}

bool common_speculative_window_hides(const common_params_speculative_window & params, llama_pos pos) {
    return pos >= params.size;
}

llama_tokens common_speculative_window_draft(
        llama_context  * ctx,
        common_sampler * smpl,
        llama_seq_id     seq_id,
        llama_pos        pos0,
        llama_token      id_last,
        int32_t          n_max) {
    const llama_vocab * vocab = llama_model_get_vocab(llama_get_model(ctx));

    llama_tokens res;

    if (!llama_swaa_set_draft_start(ctx, seq_id, pos0)) {
        return res;
    }

    common_sampler_ptr smpl_dft(common_sampler_clone(smpl));

    common_batch batch(ctx);

    llama_token id = id_last;

    // what fails ends the draft: it fails again, and is told, where the tokens are decoded and chosen
    try {
        while ((int32_t) res.size() < n_max) {
            batch.clear();
            batch.add(id, pos0 + res.size(), seq_id, true);

            const int ret = llama_process(ctx, LLAMA_PROCESS_TYPE_DECODE, batch.get());
            if (ret != 0) {
                LOG_DBG("%s: llama_process returned %d after %zu tokens\n", __func__, ret, res.size());
                break;
            }

            id = common_sampler_sample(smpl_dft.get(), ctx, 0);
            if (llama_vocab_is_eog(vocab, id)) {
                break;
            }

            common_sampler_accept(smpl_dft.get(), id, true);
            res.push_back(id);
        }
    } catch (const std::exception & e) {
        LOG_DBG("%s: %s after %zu tokens\n", __func__, e.what(), res.size());
    }

    llama_swaa_set_draft_start(ctx, seq_id, -1);
    llama_memory_seq_rm(llama_get_memory(ctx), seq_id, pos0, -1);

    return res;
}
