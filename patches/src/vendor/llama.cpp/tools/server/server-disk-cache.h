#pragma once

#include "server-task.h"

#include <condition_variable>
#include <cstdint>
#include <deque>
#include <filesystem>
#include <map>
#include <memory>
#include <mutex>
#include <string>
#include <thread>
#include <vector>

// Prompts that were read stay read: states of slots in files, found again by the longest common prefix
//
// Of a prompt only its pure tokens are kept for others, those that were read as a prompt: generated ones and those of a tail see
// more. A file appears when it is complete. A cache is no reason to fail: what cannot be read or written is warned of, and the
// prompt is read.
struct server_disk_cache {
    // from LLAMA_DISK_CACHE_DIR, _KEY (of all that shapes states but the tokens, hexadecimal) and _BYTES; null without them
    static std::unique_ptr<server_disk_cache> from_env();

    server_disk_cache(std::filesystem::path dir, std::string key, uint64_t limit);
    ~server_disk_cache(); // when everything is written

    // tokens that a state on disk has in common with these, worth_tokens at least: else 0
    //   at_checkpoints - it can be taken up at its checkpoints alone, as those of rings and recurrent layers
    size_t n_common(const llama_tokens & tokens, bool at_checkpoints);

    // make the slot hold the state that n_common() found, false: its memory and its prompt are empty now
    bool load(const llama_tokens & tokens, bool at_checkpoints, llama_context * ctx, llama_seq_id seq_id, server_prompt & prompt);

    // whether the pure tokens of a prompt are worth a file
    bool wants(const server_prompt & prompt) const;

    // keep the state of a slot, which is written by another thread
    void save(const llama_tokens & tokens, llama_context * ctx, llama_seq_id seq_id, server_prompt & prompt, const std::string & model);

    // fewer tokens are read again in about the same time
    static constexpr int32_t worth_tokens = 256;

private:
    struct entry {
        llama_tokens         tokens;
        std::vector<int64_t> checkpoints; // tokens of each
    };

    struct job {
        std::string              name;
        llama_tokens             tokens;
        json                     header; // but for the sums
        std::vector<uint8_t>     data;
        std::vector<std::string> obsolete;
    };

    const std::filesystem::path dir;
    const std::string           key;
    const uint64_t              limit;

    std::map<std::string, entry> entries; // by the file's name

    std::mutex              mutex;
    std::condition_variable changed;
    std::deque<job>         jobs;
    bool                    stop    = false;
    bool                    gave_up = false; // once is enough
    std::thread             writer;

    void refresh();
    void drop(const std::string & name, const std::string & reason);
    void write_all();
    bool write(job & item);
    void make_room(const std::string & newest);

    std::map<std::string, entry>::iterator find(const llama_tokens & tokens, bool at_checkpoints, size_t & n_common);
};
