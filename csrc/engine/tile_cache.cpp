// The tile cache: see tile_cache.h.
//
//     swinq tiles 1
//     gpu NVIDIA H100 80GB HBM3
//     build 0123456789abcdef
//     OPERAND ACTIVATION OUTPUT M N K INSTRUCTION ROWS COLUMNS       (any number of lines)
//     digest 0123456789abcdef                                        (FNV-1a of all lines before)
#include "engine/tile_cache.h"

#include <fcntl.h>
#include <sys/file.h>
#include <unistd.h>

#include <atomic>
#include <cctype>
#include <cerrno>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <filesystem>
#include <fstream>
#include <iterator>
#include <tuple>
#include <vector>

#include "engine/error.h"

namespace swinq {
namespace {

namespace fs = std::filesystem;

constexpr uintmax_t kMostBytes = 16 << 20;

std::string header(const std::string& gpu) {
    return text("swinq tiles 1\ngpu ", gpu, "\nbuild ", SWINQ_BUILD_ID, "\n");
}

std::string digest_line(const std::string& content) {
    uint64_t hash = 14695981039346656037u;
    for (const unsigned char byte : content) {
        hash = (hash ^ byte) * 1099511628211u;
    }
    char line[32];
    std::snprintf(line, sizeof line, "digest %016llx\n", static_cast<unsigned long long>(hash));
    return line;
}

fs::path cache_folder() {
    auto variable = [](const char* name) {
        const char* value = std::getenv(name);
        return fs::path(value != nullptr ? value : "");
    };
    if (const fs::path own = variable("SWINQ_CACHE_DIR"); !own.empty()) {
        return own;
    }
    if (const fs::path xdg = variable("XDG_CACHE_HOME"); xdg.is_absolute()) {
        return xdg / "swinq";
    }
    const fs::path home = variable("HOME");
    return home.is_absolute() ? home / ".cache" / "swinq" : fs::path();
}

// One line of a table: nine numbers and nothing else.
bool parse_line(const std::string& line, Tiles& tiles) {
    TileKey key;
    GemmTile tile;
    int used = 0;
    const int found = std::sscanf(line.c_str(), "%9d %9d %9d %10d %9d %9d %9d %9d %9d%n",
                                  &key.operand, &key.activation, &key.output, &key.m, &key.n,
                                  &key.k, &tile.instruction, &tile.rows, &tile.columns, &used);
    return found == 9 && static_cast<size_t>(used) == line.size() &&
           tiles.emplace(key, tile).second;
}

[[noreturn]] void fail_to_write(const std::string& path, int error) {
    refuse(text("cannot write the tile cache ", path, ": ", std::strerror(error)),
           "make its folder writable, or name another in SWINQ_CACHE_DIR");
}

// Held by one thread of one process on this machine or, where the file system passes locks on, of
// all that share it. Without locks of the file system there is none: the last one to add wins.
class Lock {
  public:
    explicit Lock(const std::string& path)
        : file_(open(path.c_str(), O_RDWR | O_CREAT | O_CLOEXEC, 0666)) {
        if (file_ < 0) {
            fail_to_write(path, errno);
        }
        while (flock(file_, LOCK_EX) != 0 && errno == EINTR) {
        }
    }
    Lock(const Lock&) = delete;
    Lock& operator=(const Lock&) = delete;
    ~Lock() {
        flock(file_, LOCK_UN);  // a child of a fork by another thread may keep the file open
        close(file_);
    }

  private:
    const int file_;
};

// A name beside the final one that no other thread, process or machine takes.
std::string partial_path(const std::string& path) {
    static std::atomic<int> number;
    char host[64] = {};
    gethostname(host, sizeof host - 1);
    return text(path, ".", host, ".", getpid(), ".", number++, ".partial");
}

// A new file, complete and on the disk.
void write_file(const std::string& path, const std::string& content) {
    std::FILE* file = std::fopen(path.c_str(), "w");
    if (file == nullptr) {
        fail_to_write(path, errno);
    }
    errno = 0;
    bool written = std::fwrite(content.data(), 1, content.size(), file) == content.size();
    written = std::fflush(file) == 0 && fsync(fileno(file)) == 0 && written;
    written = std::fclose(file) == 0 && written;
    if (!written) {
        const int error = errno;
        std::remove(path.c_str());
        fail_to_write(path, error);
    }
}

}  // namespace

bool TileKey::operator<(const TileKey& other) const {
    return std::tie(operand, activation, output, m, n, k) <
           std::tie(other.operand, other.activation, other.output, other.m, other.n, other.k);
}

TileKey tile_key(const GemmArguments& a) {
    return {static_cast<int>(a.operand),
            static_cast<int>(a.activation),
            static_cast<int>(a.output),
            a.m,
            a.n,
            a.k};
}

bool exists(const GemmTile& tile, const GemmArguments& arguments) {
    std::vector<GemmTile> tiles(static_cast<size_t>(list_tiles(arguments, nullptr, 0)));
    list_tiles(arguments, tiles.data(), static_cast<int>(tiles.size()));
    for (const GemmTile& other : tiles) {
        if (other.instruction == tile.instruction && other.rows == tile.rows &&
            other.columns == tile.columns) {
            return true;
        }
    }
    return false;
}

std::string tile_cache_path(const std::string& gpu) {
    const fs::path folder = cache_folder();
    if (folder.empty()) {
        return "";
    }
    std::string name = "tiles-";
    for (const unsigned char c : gpu) {
        name += std::isalnum(c) != 0 ? static_cast<char>(std::tolower(c)) : '-';
    }
    return folder / (name + "-" + SWINQ_BUILD_ID + ".txt");
}

std::string format_tiles(const std::string& gpu, const Tiles& tiles) {
    std::string content = header(gpu);
    for (const auto& [key, tile] : tiles) {
        content += text(key.operand, ' ', key.activation, ' ', key.output, ' ', key.m, ' ', key.n,
                        ' ', key.k, ' ', tile.instruction, ' ', tile.rows, ' ', tile.columns, '\n');
    }
    return content + digest_line(content);
}

Tiles parse_tiles(const std::string& content, const std::string& gpu) {
    const std::string start = header(gpu);
    const size_t end = content.rfind("digest ");
    if (end == std::string::npos || end < start.size() || content.compare(0, start.size(), start) ||
        content.substr(end) != digest_line(content.substr(0, end))) {
        return {};
    }
    Tiles tiles;
    std::istringstream lines(content.substr(start.size(), end - start.size()));
    for (std::string line; std::getline(lines, line);) {
        if (!parse_line(line, tiles)) {
            return {};
        }
    }
    return tiles;
}

Tiles read_tiles(const std::string& path, const std::string& gpu) {
    std::error_code error;
    if (path.empty() || !fs::is_regular_file(path, error) ||
        fs::file_size(path, error) > kMostBytes || error) {
        return {};
    }
    std::ifstream file(path, std::ios::binary);
    const std::string content((std::istreambuf_iterator<char>(file)), {});
    return parse_tiles(content, gpu);
}

void add_tiles(const std::string& path, const std::string& gpu, const Tiles& tiles) {
    if (path.empty()) {
        refuse("no folder for the tile cache: SWINQ_CACHE_DIR, XDG_CACHE_HOME and HOME are not set",
               "name one in SWINQ_CACHE_DIR");
    }
    std::error_code error;
    fs::create_directories(fs::path(path).parent_path(), error);
    if (error) {
        fail_to_write(path, error.value());
    }
    const Lock lock(path + ".lock");
    Tiles all = tiles;
    all.merge(read_tiles(path, gpu));  // keeps what is new where both have a GEMM
    const std::string partial = partial_path(path);
    write_file(partial, format_tiles(gpu, all));
    fs::rename(partial, path, error);
    if (error) {
        std::remove(partial.c_str());
        fail_to_write(path, error.value());
    }
}

}  // namespace swinq
