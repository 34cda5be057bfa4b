// A safetensors file, read whole and checked: https://github.com/huggingface/safetensors.
#pragma once

#include <cstdint>
#include <map>
#include <string>
#include <vector>

namespace swinq {

class Safetensors {
  public:
    struct Tensor {
        std::string dtype;  // such as I8, F16, F32
        std::vector<int64_t> shape;
        const uint8_t* data;  // aligned to its elements
        size_t bytes;
    };

    // Throws an Error that names the file and what is wrong with it: missing, no such file, cut
    // short, a header that is not one, tensors that overlap, leave gaps or lie outside.
    explicit Safetensors(const std::string& path);

    const std::map<std::string, std::string>& metadata() const { return metadata_; }
    const std::map<std::string, Tensor>& tensors() const { return tensors_; }

  private:
    void read_header(const std::string& header);

    std::string path_;
    std::vector<uint8_t> data_;
    std::map<std::string, std::string> metadata_;
    std::map<std::string, Tensor> tensors_;
};

}  // namespace swinq
