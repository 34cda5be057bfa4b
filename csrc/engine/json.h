// JSON, read strictly: RFC 8259 and nothing more, no key twice, nesting and numbers within bounds.
#pragma once

#include <cstdint>
#include <map>
#include <string>
#include <variant>
#include <vector>

namespace swinq {

class Json {
  public:
    using Array = std::vector<Json>;
    using Object = std::map<std::string, Json>;
    using Value = std::variant<std::nullptr_t, bool, int64_t, double, std::string, Array, Object>;

    Json() = default;
    template <typename T>
    static Json of(T value) {
        Json json;
        json.value_.template emplace<T>(std::move(value));
        return json;
    }

    // Throws an Error that says where the text stops being JSON.
    static Json parse(const std::string& text);

    template <typename T>
    const T* get_if() const {
        return std::get_if<T>(&value_);
    }
    const char* kind() const;  // such as "an object"

  private:
    Value value_ = nullptr;
};

// A text as Python's json.dumps writes it: quoted, ASCII only. Throws if it is not UTF-8.
std::string json_quoted(const std::string& text);

}  // namespace swinq
