// The files of server_disk_cache
//
// The format is that of swaa_local/prefix_cache/state_file.py, little-endian: magic, u32 version, u32 bytes and CRC-32 of a JSON
// header, the header, the tokens as i32, and the state. Here the state is that of the sequence, and behind it those of the
// checkpoints that the header lists. Relies on the numbers that llama_state_seq_*_ext() return, and on common_prompt_checkpoint.

#include "server-disk-cache.h"

#include "common.h"
#include "log.h"

#include <algorithm>
#include <array>
#include <cinttypes>
#include <cstdlib>
#include <cstring>
#include <fstream>
#include <stdexcept>

#if defined(_WIN32)
#include <process.h>
#define server_getpid _getpid
#else
#include <unistd.h>
#define server_getpid getpid
#endif

namespace fs = std::filesystem;

static constexpr char     DISK_MAGIC[9]     = "SWAAKV\r\n";
static constexpr uint32_t DISK_VERSION      = 1;
static constexpr size_t   DISK_PREAMBLE     = 8 + 3*4;
static constexpr size_t   DISK_MAX_HEADER   = 1 << 16;
static constexpr size_t   DISK_MAX_JOBS     = 2;
static constexpr uint64_t DISK_LEAST_FREE   = 1ull << 30; // a cache must not be what fills a disk
static constexpr auto     DISK_FORGOTTEN    = std::chrono::hours(1);
static constexpr char     DISK_SUFFIX[]     = ".prefix";
static constexpr char     DISK_TEMPORARY[]  = ".swaa-part-";

// CRC-32 as of zlib, eight bytes at a time
static uint32_t disk_crc(const void * data, size_t n) {
    static const auto table = [] {
        std::array<std::array<uint32_t, 256>, 8> t;
        for (uint32_t i = 0; i < 256; i++) {
            uint32_t c = i;
            for (int k = 0; k < 8; k++) {
                c = c & 1 ? 0xEDB88320u ^ (c >> 1) : c >> 1;
            }
            t[0][i] = c;
        }
        for (uint32_t i = 0; i < 256; i++) {
            for (int k = 1; k < 8; k++) {
                t[k][i] = t[0][t[k - 1][i] & 255] ^ (t[k - 1][i] >> 8);
            }
        }
        return t;
    }();

    const auto * p = static_cast<const uint8_t *>(data);

    uint32_t c = 0xFFFFFFFFu;
    for (; n >= 8; n -= 8, p += 8) {
        const uint32_t lo = c ^ (p[0] | p[1] << 8 | p[2] << 16 | uint32_t(p[3]) << 24);
        c = table[7][lo & 255] ^ table[6][lo >> 8 & 255] ^ table[5][lo >> 16 & 255] ^ table[4][lo >> 24] ^
            table[3][p[4]]     ^ table[2][p[5]]          ^ table[1][p[6]]           ^ table[0][p[7]];
    }
    for (; n > 0; n--, p++) {
        c = table[0][(c ^ *p) & 255] ^ (c >> 8);
    }
    return ~c;
}

static void disk_put(std::string & out, uint32_t value) {
    for (int i = 0; i < 4; i++) {
        out += char(value >> 8*i & 255);
    }
}

static uint32_t disk_get(const char * in) {
    const auto * p = reinterpret_cast<const uint8_t *>(in);
    return p[0] | p[1] << 8 | p[2] << 16 | uint32_t(p[3]) << 24;
}

// header and tokens of a file, throws with the reason if it is not whole
static json disk_read_head(std::ifstream & file, const fs::path & path, llama_tokens & tokens) {
    std::array<char, DISK_PREAMBLE> preamble;
    if (!file.read(preamble.data(), preamble.size())) {
        throw std::runtime_error("it is not whole");
    }
    if (memcmp(preamble.data(), DISK_MAGIC, 8) != 0 || disk_get(&preamble[8]) != DISK_VERSION) {
        throw std::runtime_error("it is of another version");
    }

    std::string text(std::min<size_t>(disk_get(&preamble[12]), DISK_MAX_HEADER), 0);
    if (!file.read(text.data(), text.size()) || disk_crc(text.data(), text.size()) != disk_get(&preamble[16])) {
        throw std::runtime_error("its header is damaged");
    }

    const json header = json::parse(text);

    const auto n_tokens = header.at("n_tokens").get<uint64_t>();
    const auto n_bytes  = header.at("n_bytes" ).get<uint64_t>();
    if (fs::file_size(path) != DISK_PREAMBLE + text.size() + 4*n_tokens + n_bytes) {
        throw std::runtime_error("it is not whole");
    }

    tokens.resize(n_tokens);
    if (!file.read(reinterpret_cast<char *>(tokens.data()), 4*n_tokens) || disk_crc(tokens.data(), 4*n_tokens) != header.at("tokens_crc").get<uint32_t>()) {
        throw std::runtime_error("its tokens are damaged");
    }
    return header;
}

// what is in a directory now, while other programs may change it
static std::vector<fs::directory_entry> disk_list(const fs::path & dir) {
    std::vector<fs::directory_entry> res;
    std::error_code ec;
    for (auto it = fs::directory_iterator(dir, ec); !ec && it != fs::directory_iterator(); it.increment(ec)) {
        res.push_back(*it);
    }
    return res;
}

static size_t disk_common(const llama_tokens & a, const llama_tokens & b) {
    return std::mismatch(a.begin(), a.begin() + std::min(a.size(), b.size()), b.begin()).first - a.begin();
}

std::unique_ptr<server_disk_cache> server_disk_cache::from_env() {
    const char * dir   = std::getenv("LLAMA_DISK_CACHE_DIR");
    const char * key   = std::getenv("LLAMA_DISK_CACHE_KEY");
    const char * bytes = std::getenv("LLAMA_DISK_CACHE_BYTES");
    if (!dir || !key || !bytes) {
        return nullptr;
    }
    return std::make_unique<server_disk_cache>(fs::path(dir), key, std::strtoull(bytes, nullptr, 10));
}

server_disk_cache::server_disk_cache(fs::path dir, std::string key, uint64_t limit) : dir(std::move(dir)), key(std::move(key)), limit(limit) {
    std::error_code ec;
    for (const auto & file : disk_list(this->dir)) {
        const auto age = fs::file_time_type::clock::now() - fs::last_write_time(file, ec);
        if (file.path().filename().string().rfind(DISK_TEMPORARY, 0) == 0 && age > DISK_FORGOTTEN) {
            fs::remove(file.path(), ec); // of a server that was killed
        }
    }
    writer = std::thread([this] { write_all(); });
}

server_disk_cache::~server_disk_cache() {
    {
        std::lock_guard<std::mutex> lock(mutex);
        stop = true;
    }
    changed.notify_one();
    writer.join();
}

void server_disk_cache::drop(const std::string & name, const std::string & reason) {
    std::error_code ec;
    SRV_WRN("a cached state is not used: %s (%s)\n", reason.c_str(), name.c_str());
    fs::remove(dir / name, ec);
    entries.erase(name);
}

// other programs write and remove files, too
void server_disk_cache::refresh() {
    std::map<std::string, entry> now;
    std::vector<std::pair<std::string, std::string>> bad;

    for (const auto & file : disk_list(dir)) {
        const std::string name = file.path().filename().string();
        if (name.rfind(key.substr(0, 16) + "-", 0) != 0 || file.path().extension() != DISK_SUFFIX) {
            continue;
        }
        if (const auto it = entries.find(name); it != entries.end()) {
            now.insert(*it);
            continue;
        }
        try {
            entry cur;
            std::ifstream in(file.path(), std::ios::binary);
            if (!in) {
                continue; // removed meanwhile
            }
            const json header = disk_read_head(in, file.path(), cur.tokens);
            for (const auto & item : header.value("checkpoints", json::array())) {
                cur.checkpoints.push_back(item.at("n_tokens").get<int64_t>());
            }
            if (header.at("key").get<std::string>() == key) {
                now.emplace(name, std::move(cur));
            }
        } catch (const std::exception & err) {
            bad.emplace_back(name, err.what());
        }
    }
    entries = std::move(now);
    for (const auto & [name, reason] : bad) {
        drop(name, reason);
    }
}

std::map<std::string, server_disk_cache::entry>::iterator server_disk_cache::find(const llama_tokens & tokens, bool at_checkpoints, size_t & n_common) {
    auto best = entries.end();

    n_common = 0;
    for (auto it = entries.begin(); it != entries.end(); ++it) {
        size_t n = disk_common(it->second.tokens, tokens);
        if (at_checkpoints) {
            size_t n_at = 0;
            for (const auto n_checkpoint : it->second.checkpoints) {
                n_at = (size_t) n_checkpoint <= n ? std::max(n_at, (size_t) n_checkpoint) : n_at;
            }
            n = n_at;
        }
        if (n >= (size_t) worth_tokens && n > n_common) {
            n_common = n;
            best     = it;
        }
    }
    return best;
}

size_t server_disk_cache::n_common(const llama_tokens & tokens, bool at_checkpoints) {
    size_t n = 0;
    refresh();
    find(tokens, at_checkpoints, n);
    return n;
}

bool server_disk_cache::load(const llama_tokens & tokens, bool at_checkpoints, llama_context * ctx, llama_seq_id seq_id, server_prompt & prompt) {
    const int64_t t_start = ggml_time_us();

    size_t n = 0;
    const auto it = find(tokens, at_checkpoints, n);
    if (it == entries.end()) {
        return false;
    }
    const std::string name = it->first;
    const fs::path    path = dir / name;

    prompt.clear();
    llama_memory_seq_rm(llama_get_memory(ctx), seq_id, -1, -1);

    try {
        llama_tokens cached;
        std::ifstream file(path, std::ios::binary);
        if (!file) {
            throw std::runtime_error("it cannot be read");
        }
        const json header = disk_read_head(file, path, cached);

        std::vector<uint8_t> data(header.at("n_bytes").get<size_t>());
        if (!file.read(reinterpret_cast<char *>(data.data()), data.size()) || disk_crc(data.data(), data.size()) != header.at("cells_crc").get<uint32_t>()) {
            throw std::runtime_error("it is damaged");
        }

        size_t n_state = data.size();
        const json list = header.value("checkpoints", json::array());
        for (const auto & item : list) {
            n_state -= std::min(n_state, item.at("n_bytes").get<size_t>());
        }
        if (llama_state_seq_set_data_ext(ctx, data.data(), n_state, seq_id, 0) != n_state) {
            throw std::runtime_error("it is of another model or context");
        }

        size_t offset = n_state;
        for (const auto & item : list) {
            const auto n_bytes = item.at("n_bytes").get<size_t>();
            auto & cur = prompt.checkpoints.emplace_back();
            cur.n_tokens = item.at("n_tokens").get<int64_t>();
            cur.pos_min  = item.at("pos_min" ).get<llama_pos>();
            cur.pos_max  = item.at("pos_max" ).get<llama_pos>();
            cur.data_tgt.assign(data.begin() + offset, data.begin() + offset + n_bytes);
            offset += n_bytes;
        }

        // behind the pure tokens there may be cells of a tail; what a ring or a recurrent state cannot give back is replaced by a checkpoint
        llama_memory_seq_rm(llama_get_memory(ctx), seq_id, cached.size(), -1);
        prompt.tokens.insert(cached);
        prompt.n_pure = prompt.n_disk = cached.size();
    } catch (const std::exception & err) {
        drop(name, err.what());
        prompt.clear();
        llama_memory_seq_rm(llama_get_memory(ctx), seq_id, -1, -1);
        return false;
    }

    std::error_code ec;
    fs::last_write_time(path, fs::file_time_type::clock::now(), ec); // the least recently used goes first
    SRV_TRC("%zu tokens of a prompt come from the disk, which took %.2f ms\n", n, (ggml_time_us() - t_start)/1000.0);
    return true;
}

bool server_disk_cache::wants(const server_prompt & prompt) const {
    return prompt.n_pure - prompt.n_disk >= worth_tokens;
}

void server_disk_cache::save(const llama_tokens & tokens, llama_context * ctx, llama_seq_id seq_id, server_prompt & prompt, const std::string & model) {
    const size_t n_pure = prompt.n_pure;

    prompt.n_disk = prompt.n_pure; // also if it cannot be written
    {
        std::lock_guard<std::mutex> lock(mutex);
        if (gave_up || jobs.size() >= DISK_MAX_JOBS) {
            return;
        }
    }

    job item;
    size_t n_state = llama_state_seq_get_size_ext(ctx, seq_id, LLAMA_STATE_SEQ_FLAGS_NONE);
    size_t n_bytes = n_state;

    json checkpoints = json::array();
    for (const auto & cur : prompt.checkpoints) {
        if (cur.n_tokens <= (int64_t) n_pure) {
            n_bytes += cur.data_tgt.size();
            checkpoints.push_back({ { "n_tokens", cur.n_tokens }, { "pos_min", cur.pos_min }, { "pos_max", cur.pos_max }, { "n_bytes", cur.data_tgt.size() } });
        }
    }
    if (n_bytes > limit) {
        SRV_WRN("a prompt of %zu tokens is not kept: it takes %zu MiB and the cache on disk holds %" PRIu64 " MiB\n", n_pure, n_bytes >> 20, limit >> 20);
        return;
    }

    try {
        item.data.resize(n_bytes);
    } catch (const std::bad_alloc &) {
        SRV_WRN("a prompt of %zu tokens is not kept: no memory for %zu MiB\n", n_pure, n_bytes >> 20);
        return;
    }
    if (llama_state_seq_get_data_ext(ctx, item.data.data(), n_state, seq_id, LLAMA_STATE_SEQ_FLAGS_NONE) != n_state) {
        return;
    }
    size_t offset = n_state;
    for (const auto & cur : prompt.checkpoints) {
        if (cur.n_tokens <= (int64_t) n_pure) {
            std::copy(cur.data_tgt.begin(), cur.data_tgt.end(), item.data.begin() + offset);
            offset += cur.data_tgt.size();
        }
    }

    item.tokens.assign(tokens.begin(), tokens.begin() + n_pure);
    item.name   = string_format("%s-%08x%08zx%s", key.substr(0, 16).c_str(), disk_crc(item.tokens.data(), 4*n_pure), n_pure, DISK_SUFFIX);
    item.header = {
        { "key",         key         },
        { "model",       model       },
        { "schedule",    "serve"     },
        { "n_tokens",    n_pure      },
        { "n_bytes",     n_bytes     },
        { "checkpoints", checkpoints },
    };

    // a longer one serves whatever those do that it begins with
    for (const auto & [name, cur] : entries) {
        if (cur.tokens.size() < n_pure && std::equal(cur.tokens.begin(), cur.tokens.end(), tokens.begin())) {
            item.obsolete.push_back(name);
        }
    }

    {
        std::lock_guard<std::mutex> lock(mutex);
        jobs.push_back(std::move(item));
    }
    changed.notify_one();
}

void server_disk_cache::write_all() {
    std::unique_lock<std::mutex> lock(mutex);
    while (true) {
        changed.wait(lock, [this] { return stop || !jobs.empty(); });
        if (jobs.empty()) {
            return;
        }
        job item = std::move(jobs.front()); // its place is free when it is written
        lock.unlock();
        const bool ok = write(item);
        lock.lock();
        jobs.pop_front();
        gave_up = gave_up || !ok;
    }
}

bool server_disk_cache::write(job & item) {
    item.header["tokens_crc"] = disk_crc(item.tokens.data(), 4*item.tokens.size());
    item.header["cells_crc" ] = disk_crc(item.data.data(), item.data.size());
    const std::string header  = safe_json_to_str(item.header);

    std::string head(DISK_MAGIC, 8);
    disk_put(head, DISK_VERSION);
    disk_put(head, header.size());
    disk_put(head, disk_crc(header.data(), header.size()));
    head += header;
    head.append(reinterpret_cast<const char *>(item.tokens.data()), 4*item.tokens.size());

    const uint64_t n_bytes   = head.size() + item.data.size();
    const fs::path temporary = dir / string_format("%s%d-%s", DISK_TEMPORARY, (int) server_getpid(), item.name.c_str());

    std::error_code ec;
    try {
        if (fs::space(dir).available < n_bytes + DISK_LEAST_FREE) {
            throw std::runtime_error("the disk is nearly full");
        }
        {
            std::ofstream file(temporary, std::ios::binary | std::ios::trunc);
            fs::permissions(temporary, fs::perms::owner_read | fs::perms::owner_write); // while it is empty
            file.write(head.data(), head.size());
            file.write(reinterpret_cast<const char *>(item.data.data()), item.data.size());
            file.close();
            if (!file) {
                throw std::runtime_error("it cannot be written: " + std::string(strerror(errno)));
            }
        }
        fs::rename(temporary, dir / item.name);
    } catch (const std::exception & err) {
        fs::remove(temporary, ec);
        SRV_WRN("prompts that were read are not kept: %s\n", err.what());
        return false;
    }

    for (const auto & name : item.obsolete) {
        fs::remove(dir / name, ec);
    }
    make_room(item.name);
    return true;
}

void server_disk_cache::make_room(const std::string & newest) {
    struct found {
        fs::file_time_type used;
        uint64_t           size;
        fs::path           path;
    };

    std::error_code ec;
    std::vector<found> files;
    uint64_t total = 0;
    for (const auto & file : disk_list(dir)) {
        const auto suffix = file.path().extension();
        const auto size   = file.file_size(ec);
        if ((suffix == DISK_SUFFIX || suffix == ".conversation") && !ec) {
            files.push_back({ file.last_write_time(ec), size, file.path() });
            total += size;
        }
    }
    std::sort(files.begin(), files.end(), [](const found & a, const found & b) { return a.used < b.used; });
    for (const auto & file : files) {
        if (total <= limit) {
            return;
        }
        if (file.path.filename() != newest) {
            fs::remove(file.path, ec);
            total -= file.size;
        }
    }
}
