// An INT8 checkpoint: see checkpoint.h.
#include "engine/checkpoint.h"

#include <algorithm>
#include <climits>

#include "engine/error.h"
#include "engine/format.h"
#include "engine/json.h"
#include "engine/sha256.h"

namespace swinq {
namespace {

using Metadata = std::map<std::string, std::string>;

constexpr const char* kExportAgain = "export the model again; this file cannot be repaired";
constexpr const char* kCopyAgain = "copy or download the file again, or export the model again";
constexpr const char* kKeys[] = {"architecture",  "calibration",    "classes",   "digests",
                                 "format",        "format_version", "int8_mode", "precision",
                                 "swinq_version", "transform"};

void require_int8_format(const Safetensors& file) {
    const auto format = file.metadata().find("format");
    if (format == file.metadata().end() || format->second != "swinq-int8") {
        for (const auto& entry : file.tensors()) {
            if (entry.first.find("_amax") != std::string::npos) {
                refuse("a calibrated checkpoint with fake quantizers, wanted an INT8 checkpoint",
                       "export it first: torchrun swinq/main.py --export --resume FILE");
            }
        }
        refuse(text("format is ",
                    format == file.metadata().end() ? "not given" : "'" + format->second + "'",
                    ", wanted 'swinq-int8'; a float model has no scales"),
               "calibrate and export it first: torchrun swinq/main.py --calib --pretrained FILE");
    }
}

void require_version_and_keys(const Metadata& metadata) {
    const auto version = metadata.find("format_version");
    if (version != metadata.end() && version->second != "1") {
        refuse(text("format_version is '", version->second.substr(0, 9), "', this swinq reads 1"),
               "update swinq, or export the model with this one");
    }
    for (const char* key : kKeys) {
        if (metadata.count(key) == 0) {
            refuse(text("metadata: ", key, " is missing"), kExportAgain);
        }
    }
    for (const auto& entry : metadata) {
        if (std::find(std::begin(kKeys), std::end(kKeys), entry.first) == std::end(kKeys)) {
            refuse(text("metadata: '", entry.first.substr(0, 60), "' is unknown"), kExportAgain);
        }
    }
}

Json::Object object_in(const Metadata& metadata, const char* key) {
    const Json json = Json::parse(metadata.at(key));
    const auto* object = json.get_if<Json::Object>();
    if (object == nullptr) {
        refuse(text("metadata: ", key, " is ", json.kind(), ", wanted an object"), kExportAgain);
    }
    return *object;
}

void require_classes(const Metadata& metadata, int num_classes) {
    const Json json = Json::parse(metadata.at("classes"));
    const auto* names = json.get_if<Json::Array>();
    const bool all_texts =
        names != nullptr && std::all_of(names->begin(), names->end(), [](auto& n) {
            return n.template get_if<std::string>() != nullptr;
        });
    if (json.get_if<std::nullptr_t>() == nullptr && !all_texts) {
        refuse("metadata: classes is neither a list of names nor null", kExportAgain);
    }
    if (names != nullptr && names->size() != static_cast<size_t>(num_classes)) {
        refuse(text("metadata: ", names->size(), " class names for a head of ", num_classes,
                    " classes"),
               kExportAgain);
    }
}

int mode_in(const Metadata& metadata, int asked) {
    const std::string& said = metadata.at("int8_mode");
    if (said != "1" && said != "2") {
        refuse(text("int8_mode is '", said.substr(0, 20), "', wanted 1 or 2"), kExportAgain);
    }
    const int mode = said[0] - '0';
    if (asked != 0 && asked != mode) {
        refuse(text("was exported in int8 mode ", mode, ", int8 mode ", asked, " was asked for"),
               text("ask for mode ", mode, ", or export again with --int8-mode ", asked));
    }
    return mode;
}

// Takes the fields of the metadata's architecture one by one.
class ArchitectureReader {
  public:
    explicit ArchitectureReader(Json::Object fields) : fields_(std::move(fields)) {}

    int32_t integer(const char* name) { return integer(name, take(name)); }

    double real(const char* name) {
        const Json json = take(name);
        if (const auto* whole = json.get_if<int64_t>()) {
            return static_cast<double>(*whole);
        }
        const auto* value = json.get_if<double>();
        if (value == nullptr) {
            refuse_kind(name, json, "a number");
        }
        return *value;
    }

    void boolean(const char* name) {
        const Json json = take(name);
        if (json.get_if<bool>() == nullptr) {
            refuse_kind(name, json, "a truth value");
        }
    }

    // Up to SWINQ_MAX_STAGES numbers; how many.
    int32_t integers(const char* name, int32_t* values) {
        const Json json = take(name);
        const auto* items = json.get_if<Json::Array>();
        if (items == nullptr) {
            refuse_kind(name, json, "a list");
        }
        if (items->size() > SWINQ_MAX_STAGES) {
            fail(Error::kUnsupported,
                 text("architecture: ", name, " has ", items->size(),
                      " values; the engine runs up to ", SWINQ_MAX_STAGES, " stages"),
                 "run it on the CPU");
        }
        for (const Json& item : *items) {
            *values++ = integer(name, item);
        }
        return static_cast<int32_t>(items->size());
    }

    void finish() const {
        if (!fields_.empty()) {
            refuse(text("architecture: unknown key ", fields_.begin()->first.substr(0, 60)),
                   kExportAgain);
        }
    }

  private:
    Json take(const char* name) {
        const auto found = fields_.find(name);
        if (found == fields_.end()) {
            refuse(text("architecture: missing key ", name), kExportAgain);
        }
        Json json = std::move(found->second);
        fields_.erase(found);
        return json;
    }

    static int32_t integer(const char* name, const Json& json) {
        const auto* value = json.get_if<int64_t>();
        if (value == nullptr) {
            refuse_kind(name, json, "a whole number");
        }
        if (*value < INT_MIN || *value > INT_MAX) {
            refuse(text("architecture: ", name, " is ", *value), kExportAgain);
        }
        return static_cast<int32_t>(*value);
    }

    [[noreturn]] static void refuse_kind(const char* name, const Json& json, const char* wanted) {
        refuse(text("architecture: ", name, " is ", json.kind(), ", wanted ", wanted),
               kExportAgain);
    }

    Json::Object fields_;
};

swinq_architecture architecture_in(const Metadata& metadata) {
    ArchitectureReader reader(object_in(metadata, "architecture"));
    swinq_architecture a = {};
    int32_t pretrained[SWINQ_MAX_STAGES] = {};
    a.version = reader.integer("version");
    a.img_size = reader.integer("img_size");
    a.patch_size = reader.integer("patch_size");
    a.in_chans = reader.integer("in_chans");
    a.num_classes = reader.integer("num_classes");
    a.embed_dim = reader.integer("embed_dim");
    a.stages = reader.integers("depths", a.depths);
    const int32_t heads = reader.integers("num_heads", a.num_heads);
    const int32_t windows = reader.integers("pretrained_window_sizes", pretrained);
    a.window_size = reader.integer("window_size");
    a.mlp_ratio = reader.real("mlp_ratio");
    a.norm_eps = static_cast<float>(reader.real("norm_eps"));
    reader.boolean("qkv_bias");
    reader.finish();
    if (heads != a.stages || windows != a.stages) {
        refuse(text("architecture: ", heads, " values of num_heads and ", windows,
                    " of pretrained_window_sizes for ", a.stages, " stages"),
               kExportAgain);
    }
    if (a.version == 1 && std::any_of(pretrained, pretrained + windows, [](int w) { return w; })) {
        refuse("architecture: pretrained_window_sizes are not all 0; version 1 has none",
               kExportAgain);
    }
    return a;
}

swinq_precision precision_of(const std::string& layer, const Json& json, int mode) {
    const auto* word = json.get_if<std::string>();
    const auto ends_with = [&layer](const std::string& end) {
        return layer.size() >= end.size() &&
               layer.compare(layer.size() - end.size(), end.size(), end) == 0;
    };
    if (word != nullptr) {
        const bool unrounded_mode = mode == 2 && (ends_with(".fc2") || ends_with(".reduction"));
        if (*word == "int8" && !unrounded_mode) {
            return SWINQ_PRECISION_INT8;
        }
        if (*word == "int8-unrounded") {
            return SWINQ_PRECISION_INT8_UNROUNDED;  // the plan knows which layers may be
        }
        if (*word == "fp16") {
            return SWINQ_PRECISION_FP16;
        }
    }
    refuse(text("precision: ", layer.substr(0, 80), " is ",
                word != nullptr ? "'" + word->substr(0, 20) + "'" : std::string(json.kind()),
                ", which int8 mode ", mode, " does not allow"),
           kExportAgain);
}

void require_digests(const Safetensors& file) {
    const Json::Object wanted = object_in(file.metadata(), "digests");
    auto require = [&wanted](const std::string& name, const std::string& found) {
        const auto entry = wanted.find(name);
        const auto* said = entry != wanted.end() ? entry->second.get_if<std::string>() : nullptr;
        if (said == nullptr || *said != found) {
            refuse(text("changed since it was written: ", name, "\n  sha256 ", found, ", wanted ",
                        said != nullptr ? said->substr(0, 64) : "none"),
                   kCopyAgain);
        }
    };
    std::string rest;  // all other metadata as Python's json.dumps writes it, keys sorted
    for (const auto& [key, value] : file.metadata()) {
        if (key != "digests") {
            rest += (rest.empty() ? "{" : ",") + json_quoted(key) + ":" + json_quoted(value);
        }
    }
    rest += "}";
    require("__metadata__", sha256(rest.data(), rest.size()));
    for (const auto& [name, tensor] : file.tensors()) {
        require(name, sha256(tensor.data, tensor.bytes));
    }
    if (wanted.size() != file.tensors().size() + 1) {
        refuse(text("changed since it was written: ", wanted.size() - 1, " digests for ",
                    file.tensors().size(), " tensors"),
               kCopyAgain);
    }
}

swinq_tensor tensor_in(const std::string& name, const Safetensors::Tensor& found) {
    swinq_tensor tensor = {};
    tensor.name = name.c_str();
    if (found.dtype == "I8") {
        tensor.type = SWINQ_INT8;
    } else if (found.dtype == "F16") {
        tensor.type = SWINQ_HALF;
    } else if (found.dtype == "F32") {
        tensor.type = SWINQ_FLOAT;
    } else {
        refuse(text(name.substr(0, 80), " is ", found.dtype, ", wanted int8, float16 or float32"),
               kExportAgain);
    }
    if (found.shape.size() > 4) {
        refuse(text(name.substr(0, 80), " has shape ", shape_text(found.shape)), kExportAgain);
    }
    tensor.rank = static_cast<int32_t>(found.shape.size());
    std::copy(found.shape.begin(), found.shape.end(), tensor.shape);
    tensor.data = found.data;
    return tensor;
}

}  // namespace

Checkpoint::Checkpoint(const std::string& path, int asked_mode) : file_(path) {
    try {
        read(asked_mode);
    } catch (const Error& error) {
        throw Error(error.code, text(path, ": ", error.what()));
    }
}

void Checkpoint::read(int asked_mode) {
    const Metadata& metadata = file_.metadata();
    require_int8_format(file_);
    require_version_and_keys(metadata);
    object_in(metadata, "calibration");
    object_in(metadata, "transform");
    architecture_ = architecture_in(metadata);
    require_classes(metadata, architecture_.num_classes);
    int8_mode_ = mode_in(metadata, asked_mode);
    const Json::Object table = object_in(metadata, "precision");
    layer_names_.reserve(table.size());  // layers_ points at the names
    for (const auto& [name, word] : table) {
        layer_names_.push_back(name);
        layers_.push_back({layer_names_.back().c_str(), precision_of(name, word, int8_mode_)});
    }
    for (const auto& [name, tensor] : file_.tensors()) {
        tensors_.push_back(tensor_in(name, tensor));
    }
    require_digests(file_);
}

swinq_model Checkpoint::model() const {
    return {architecture_, tensors_.data(), tensors_.size(), layers_.data(), layers_.size()};
}

}  // namespace swinq
