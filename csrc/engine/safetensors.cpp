// A safetensors file: see safetensors.h. Eight bytes give the length of the header, a JSON object;
// behind it lie the tensors without gaps.
#include "engine/safetensors.h"

#include <sys/stat.h>
#include <algorithm>
#include <cerrno>
#include <cstdio>
#include <cstring>
#include <memory>

#include "engine/error.h"
#include "engine/json.h"

namespace swinq {
namespace {

constexpr uint64_t kLargestHeader = 100'000'000;  // as the format's own library has it
constexpr const char* kCopyAgain = "copy or download the file again, or export the model again";
constexpr const char* kGiveExported = "give the .safetensors file that --export wrote";

struct CloseFile {
    void operator()(std::FILE* file) const { std::fclose(file); }
};
using File = std::unique_ptr<std::FILE, CloseFile>;

uint64_t size_of_file(const std::string& path, std::FILE* file) {
    struct stat status;
    if (file == nullptr || fstat(fileno(file), &status) != 0) {
        refuse(text(path, ": cannot be read (", std::strerror(errno), ")"), kGiveExported);
    }
    if (!S_ISREG(status.st_mode)) {
        refuse(text(path, ": cannot be read (",
                    S_ISDIR(status.st_mode) ? std::strerror(EISDIR) : "not a regular file", ")"),
               kGiveExported);
    }
    return static_cast<uint64_t>(status.st_size);
}

// Fills `to` from the file, which may have become shorter since its size was asked for.
void read(const std::string& path, std::FILE* file, void* to, size_t bytes) {
    if (std::fread(to, 1, bytes, file) != bytes) {
        refuse(text(path, ": cut short while it was read"), kCopyAgain);
    }
}

int64_t element_size(const std::string& dtype) {
    static const std::map<std::string, int64_t> kSizes = {
        {"BOOL", 1}, {"U8", 1},  {"I8", 1},  {"I16", 2}, {"U16", 2}, {"F16", 2}, {"BF16", 2},
        {"I32", 4},  {"U32", 4}, {"F32", 4}, {"F64", 8}, {"I64", 8}, {"U64", 8}};
    const auto found = kSizes.find(dtype);
    return found == kSizes.end() ? 0 : found->second;
}

// A list of numbers that are not negative; false if it is no such list.
bool read_sizes(const Json& json, std::vector<int64_t>& sizes) {
    const auto* items = json.get_if<Json::Array>();
    if (items == nullptr) {
        return false;
    }
    for (const Json& item : *items) {
        const auto* size = item.get_if<int64_t>();
        if (size == nullptr || *size < 0) {
            return false;
        }
        sizes.push_back(*size);
    }
    return true;
}

// The product of a shape and an element's size; -1 where it is more than `most`.
int64_t bytes_of(const std::vector<int64_t>& shape, int64_t size, int64_t most) {
    int64_t bytes = size;
    for (int64_t extent : shape) {
        if (extent != 0 && bytes > most / extent) {
            return -1;
        }
        bytes *= extent;
    }
    return bytes <= most ? bytes : -1;
}

}  // namespace

Safetensors::Safetensors(const std::string& path) : path_(path) {
    errno = 0;
    const File file(std::fopen(path.c_str(), "rb"));
    const uint64_t size = size_of_file(path, file.get());
    uint8_t start[9] = {};
    const size_t there = std::fread(start, 1, sizeof start, file.get());
    if (there >= 2 &&
        (std::memcmp(start, "PK", 2) == 0 || std::memcmp(start, "\x80\x02", 2) == 0)) {
        refuse(text(path, ": a torch checkpoint, wanted an INT8 checkpoint (safetensors)"),
               "calibrate and export it first: torchrun swinq/main.py --calib --pretrained FILE");
    }
    if (there < sizeof start || start[8] != '{') {
        refuse(text(path, ": not a safetensors file (", size, " bytes)"), kGiveExported);
    }
    uint64_t header_bytes = 0;
    for (size_t i = 0; i < 8; ++i) {
        header_bytes |= uint64_t{start[i]} << (8 * i);
    }
    if (header_bytes > kLargestHeader || header_bytes > size - 8) {
        refuse(text(path, ": cut short: ", size, " bytes, its header alone claims ", header_bytes),
               kCopyAgain);
    }
    std::string header(header_bytes, '\0');
    std::fseek(file.get(), 8, SEEK_SET);
    read(path, file.get(), header.data(), header.size());
    data_.resize(size - 8 - header_bytes);
    read(path, file.get(), data_.data(), data_.size());
    try {
        read_header(header);
    } catch (const Error& error) {
        throw Error(error.code, text(path, ": ", error.what()));
    }
}

void Safetensors::read_header(const std::string& header) {
    const Json json = Json::parse(header);
    std::vector<std::pair<int64_t, int64_t>> extents;  // start, stop
    for (const auto& [name, entry] : *json.get_if<Json::Object>()) {
        const auto* fields = entry.get_if<Json::Object>();
        if (name == "__metadata__" && fields != nullptr) {
            for (const auto& [key, value] : *fields) {
                const auto* said = value.get_if<std::string>();
                if (said == nullptr) {
                    refuse(text("metadata: ", key, " is ", value.kind(), ", wanted a text"),
                           kCopyAgain);
                }
                metadata_[key] = *said;
            }
            continue;
        }
        Tensor tensor = {};
        std::vector<int64_t> offsets;
        const bool complete = fields != nullptr && fields->size() == 3 && fields->count("dtype") &&
                              fields->count("shape") && fields->count("data_offsets");
        const std::string* dtype = complete ? fields->at("dtype").get_if<std::string>() : nullptr;
        const int64_t size = dtype != nullptr ? element_size(*dtype) : 0;
        if (size == 0 || !read_sizes(fields->at("shape"), tensor.shape) ||
            !read_sizes(fields->at("data_offsets"), offsets) || offsets.size() != 2) {
            refuse(text("damaged: the entry of ", name.substr(0, 80), " is no tensor's"),
                   kCopyAgain);
        }
        const auto most = static_cast<int64_t>(data_.size());
        if (offsets[0] > offsets[1] || offsets[1] > most || offsets[0] % size != 0 ||
            bytes_of(tensor.shape, size, most) != offsets[1] - offsets[0]) {
            refuse(text("damaged or cut short: ", name.substr(0, 80), " lies at bytes ", offsets[0],
                        " to ", offsets[1], " of ", most, ", which does not fit its shape"),
                   kCopyAgain);
        }
        tensor.dtype = *dtype;
        tensor.data = data_.data() + offsets[0];
        tensor.bytes = static_cast<size_t>(offsets[1] - offsets[0]);
        tensors_[name] = tensor;
        extents.emplace_back(offsets[0], offsets[1]);
    }
    std::sort(extents.begin(), extents.end());
    int64_t end = 0;
    for (const auto& [start, stop] : extents) {
        if (start != end) {
            refuse(text("damaged: tensors overlap or leave a gap at byte ", end), kCopyAgain);
        }
        end = stop;
    }
    if (end != static_cast<int64_t>(data_.size())) {
        refuse(text("damaged: ", data_.size() - static_cast<size_t>(end),
                    " bytes behind the last tensor"),
               kCopyAgain);
    }
}

}  // namespace swinq
