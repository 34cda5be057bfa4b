// JSON: see json.h.
#include "engine/json.h"

#include <charconv>
#include <cstdio>
#include <cstring>
#include <locale>
#include <sstream>

#include "engine/error.h"

namespace swinq {
namespace {

constexpr int kDeepest = 64;

class Parser {
  public:
    explicit Parser(const std::string& text) : text_(text) {}

    Json document() {
        Json value = this->value(0);
        skip_space();
        if (at_ != text_.size()) {
            stop("something follows its end");
        }
        return value;
    }

  private:
    [[noreturn]] void stop(const char* what) const {
        refuse(text("no JSON: ", what, " at character ", at_),
               "copy or download the file again, or export the model again");
    }

    void skip_space() {
        while (at_ < text_.size() && std::strchr(" \t\n\r", text_[at_]) && text_[at_] != '\0') {
            ++at_;
        }
    }

    char peek() const { return at_ < text_.size() ? text_[at_] : '\0'; }

    bool take(char c) {
        const bool found = at_ < text_.size() && text_[at_] == c;
        at_ += found;
        return found;
    }

    void expect(char c, const char* what) {
        if (!take(c)) {
            stop(what);
        }
    }

    bool take_word(const char* word) {
        const size_t length = std::strlen(word);
        const bool found = text_.compare(at_, length, word) == 0;
        at_ += found ? length : 0;
        return found;
    }

    Json value(int depth) {
        if (depth > kDeepest) {
            stop("nested too deeply");
        }
        skip_space();
        switch (peek()) {
            case '{':
                return Json::of(object(depth));
            case '[':
                return Json::of(array(depth));
            case '"':
                return Json::of(string());
            default:
                break;
        }
        if (take_word("null")) {
            return Json();
        }
        if (take_word("true")) {
            return Json::of(true);
        }
        if (take_word("false")) {
            return Json::of(false);
        }
        return number();
    }

    Json::Object object(int depth) {
        Json::Object members;
        ++at_;
        skip_space();
        if (take('}')) {
            return members;
        }
        do {
            skip_space();
            if (peek() != '"') {
                stop("a key is missing");
            }
            std::string key = string();
            skip_space();
            expect(':', "no colon behind a key");
            if (!members.emplace(std::move(key), value(depth + 1)).second) {
                stop("a key stands twice");
            }
            skip_space();
        } while (take(','));
        expect('}', "an object does not end");
        return members;
    }

    Json::Array array(int depth) {
        Json::Array items;
        ++at_;
        skip_space();
        if (take(']')) {
            return items;
        }
        do {
            items.push_back(value(depth + 1));
            skip_space();
        } while (take(','));
        expect(']', "a list does not end");
        return items;
    }

    bool take_digits() {
        const size_t start = at_;
        while (peek() >= '0' && peek() <= '9') {
            ++at_;
        }
        return at_ != start;
    }

    Json number() {
        const size_t start = at_;
        take('-');
        const bool leads_with_zero = peek() == '0';
        const size_t digits = at_;
        if (!take_digits() || (leads_with_zero && at_ != digits + 1)) {
            at_ = start;
            stop("no value");
        }
        bool whole = true;
        if (take('.')) {
            whole = false;
            if (!take_digits()) {
                stop("no digits behind a point");
            }
        }
        if (take('e') || take('E')) {
            whole = false;
            take('-') || take('+');
            if (!take_digits()) {
                stop("no digits in an exponent");
            }
        }
        const char* first = text_.data() + start;
        const char* last = text_.data() + at_;
        int64_t integer = 0;
        if (whole && std::from_chars(first, last, integer).ec == std::errc()) {
            return Json::of(integer);
        }
        std::istringstream stream(std::string(first, last));
        stream.imbue(std::locale::classic());  // a point, whatever the process's language
        double real = 0;
        if (!(stream >> real)) {
            stop("a number out of range");
        }
        return Json::of(real);
    }

    unsigned hex4() {
        unsigned code = 0;
        const char* first = text_.data() + at_;
        if (text_.size() - at_ < 4 ||
            std::from_chars(first, first + 4, code, 16).ptr != first + 4) {
            stop("no four hexadecimal digits");
        }
        at_ += 4;
        return code;
    }

    // The code point of \uXXXX, or of two that are a surrogate pair.
    unsigned escaped_code_point() {
        const unsigned high = hex4();
        if (high < 0xd800 || high > 0xdfff) {
            return high;
        }
        if (high > 0xdbff || !take_word("\\u")) {
            stop("half a surrogate pair");
        }
        const unsigned low = hex4();
        if (low < 0xdc00 || low > 0xdfff) {
            stop("half a surrogate pair");
        }
        return 0x10000 + ((high - 0xd800) << 10) + (low - 0xdc00);
    }

    static void append_utf8(std::string& out, unsigned code) {
        auto put = [&out](unsigned byte) { out += static_cast<char>(byte); };
        if (code < 0x80) {
            put(code);
        } else if (code < 0x800) {
            put(0xc0 | code >> 6);
            put(0x80 | (code & 0x3f));
        } else if (code < 0x10000) {
            put(0xe0 | code >> 12);
            put(0x80 | (code >> 6 & 0x3f));
            put(0x80 | (code & 0x3f));
        } else {
            put(0xf0 | code >> 18);
            put(0x80 | (code >> 12 & 0x3f));
            put(0x80 | (code >> 6 & 0x3f));
            put(0x80 | (code & 0x3f));
        }
    }

    std::string string() {
        std::string out;
        ++at_;
        while (!take('"')) {
            if (at_ >= text_.size()) {
                stop("a text does not end");
            }
            const char c = text_[at_++];
            if (static_cast<unsigned char>(c) < 0x20) {
                stop("a control character in a text");
            }
            if (c != '\\') {
                out += c;
                continue;
            }
            const char escape = peek();
            ++at_;
            static constexpr char kEscapes[] = "\"\\/bfnrt", kMeant[] = "\"\\/\b\f\n\r\t";
            const char* found = escape == '\0' ? nullptr : std::strchr(kEscapes, escape);
            if (found != nullptr) {
                out += kMeant[found - kEscapes];
            } else if (escape == 'u') {
                append_utf8(out, escaped_code_point());
            } else {
                stop("an unknown escape");
            }
        }
        return out;
    }

    const std::string& text_;
    size_t at_ = 0;
};

// The code point that begins at `at`, which moves behind it.
unsigned next_code_point(const std::string& text, size_t& at) {
    const auto byte = [&text](size_t i) -> unsigned {
        return i < text.size() ? static_cast<unsigned char>(text[i]) : 0;
    };
    const unsigned first = byte(at);
    const int more = first < 0x80       ? 0
                     : first >> 5 == 6  ? 1
                     : first >> 4 == 14 ? 2
                     : first >> 3 == 30 ? 3
                                        : -1;
    static constexpr unsigned kLeadBits[] = {0x7f, 0x1f, 0x0f, 0x07};
    static constexpr unsigned kSmallest[] = {0, 0x80, 0x800, 0x10000};
    unsigned code = more < 0 ? 0 : first & kLeadBits[more];
    bool sound = more >= 0;
    for (int i = 1; i <= more; ++i) {
        const unsigned next = byte(at + static_cast<size_t>(i));
        sound = sound && next >> 6 == 2;
        code = code << 6 | (next & 0x3f);
    }
    if (!sound || code < kSmallest[more] || code > 0x10ffff || (code >> 11) == 0x1b) {
        refuse("a text is not UTF-8", "copy or download the file again, or export the model again");
    }
    at += static_cast<size_t>(more) + 1;
    return code;
}

}  // namespace

Json Json::parse(const std::string& text) {
    return Parser(text).document();
}

const char* Json::kind() const {
    static constexpr const char* kKinds[] = {
        "null", "a truth value", "a whole number", "a number", "a text", "a list", "an object"};
    return kKinds[value_.index()];
}

std::string json_quoted(const std::string& text) {
    std::string out = "\"";
    auto escape = [&out](unsigned unit) {
        char buffer[8];
        std::snprintf(buffer, sizeof buffer, "\\u%04x", unit);
        out += buffer;
    };
    for (size_t at = 0; at < text.size();) {
        const unsigned code = next_code_point(text, at);
        static constexpr char kSpecial[] = "\"\\\n\r\t\f\b", kLetters[] = "\"\\nrtfb";
        const char* special =
            code != 0 && code < 0x80 ? std::strchr(kSpecial, static_cast<int>(code)) : nullptr;
        if (special != nullptr) {
            out += '\\';
            out += kLetters[special - kSpecial];
        } else if (code >= 0x10000) {
            escape(0xd800 + ((code - 0x10000) >> 10));
            escape(0xdc00 + ((code - 0x10000) & 0x3ff));
        } else if (code < 0x20 || code > 0x7e) {
            escape(code);
        } else {
            out += static_cast<char>(code);
        }
    }
    return out + "\"";
}

}  // namespace swinq
