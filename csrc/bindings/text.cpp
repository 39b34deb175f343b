// Token ids to text: ByteTable, ByteDecoder, StreamingDetokenizer, TextStream; and `wake`.
#include <unistd.h>

#include <algorithm>
#include <cstdint>
#include <memory>
#include <optional>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

#include "bindings/bindings.h"
#include "text/stoppable.h"
#include "text/utf8.h"

namespace pyengine::bindings {

namespace {

py::object to_python(std::string_view text) {
  auto made = py::reinterpret_steal<py::object>(
      PyUnicode_DecodeUTF8(text.data(), static_cast<py::ssize_t>(text.size()), "surrogatepass"));
  if (!made) throw py::error_already_set();
  return made;
}

std::string from_python(py::handle text) {
  auto bytes = py::reinterpret_steal<py::bytes>(
      PyUnicode_AsEncodedString(text.ptr(), "utf-8", "surrogatepass"));
  if (!bytes) throw py::error_already_set();
  return bytes;
}

// What each token adds to the UTF-8 of a text, looked up when it first occurs.
class ByteTable {
 public:
  explicit ByteTable(py::object lookup) : lookup_(std::move(lookup)) {}

  const std::string& of(py::handle token) {
    if (!PyLong_Check(token.ptr())) {
      auto index = py::reinterpret_steal<py::object>(PyNumber_Index(token.ptr()));
      if (!index) throw py::error_already_set();
      return of(index);
    }
    int overflow = 0;
    const long id = PyLong_AsLongAndOverflow(token.ptr(), &overflow);
    const bool is_known = overflow == 0 && id >= 0 && static_cast<size_t>(id) < entries_.size() &&
                          entries_[id] != nullptr;
    if (is_known) return *entries_[id];
    const std::string bytes = py::bytes(lookup_(token));  // raises for an id outside the vocabulary
    if (overflow != 0 || id < 0 || id > INT32_MAX) throw py::index_error("no token has this id");
    if (static_cast<size_t>(id) >= entries_.size()) entries_.resize(id + 1);
    if (entries_[id] == nullptr) entries_[id] = std::make_unique<const std::string>(bytes);
    return *entries_[id];
  }

 private:
  py::object lookup_;
  std::vector<std::unique_ptr<const std::string>> entries_;  // never replaced once they are there
};

// Bytes of tokens to text; an unfinished character waits for its last byte.
class ByteDecoder {
 public:
  explicit ByteDecoder(std::shared_ptr<ByteTable> table) : table_(std::move(table)) {}

  void push_one(py::handle token, std::string& text) {
    const std::string& bytes = table_->of(token);
    if (pending_.empty()) {
      pending_.assign(bytes, text::append_characters(bytes, text));
      return;
    }
    pending_ += bytes;
    pending_.erase(0, text::append_characters(pending_, text));
  }

  // `ids`: an int, or any iterable of them.
  void push(py::handle ids, std::string& text) {
    if (PyLong_Check(ids.ptr())) return push_one(ids, text);
    for (py::handle token : py::reinterpret_borrow<py::iterable>(ids)) push_one(token, text);
  }

  void finish(std::string& text) {
    if (!pending_.empty()) text.append(text::kReplacement);
    pending_.clear();
  }

 private:
  std::shared_ptr<ByteTable> table_;
  std::string pending_;
};

// A decoder behind a prompt, whose text is not repeated.
class StreamingDetokenizer {
 public:
  StreamingDetokenizer(py::object decoder, py::handle prompt_ids) {
    if (py::isinstance<ByteDecoder>(decoder)) {
      bytes_ = decoder.cast<const ByteDecoder&>();
    } else {
      decoder_ = std::move(decoder);
    }
    if (py::len(prompt_ids) == 0) return;
    std::string text;
    push(prompt_ids, text);
    StreamingDetokenizer twin(*this);
    twin.flush(echo_);
  }
  StreamingDetokenizer(const StreamingDetokenizer& other)
      : bytes_(other.bytes_), echo_(other.echo_) {
    if (!bytes_) decoder_ = other.decoder_.attr("copy")();
  }
  StreamingDetokenizer& operator=(const StreamingDetokenizer&) = delete;

  void append(py::handle ids, std::string& text) {
    push(ids, text);
    drop_echo(text);
  }
  void finish(std::string& text) {
    flush(text);
    drop_echo(text);
  }

 private:
  void push(py::handle ids, std::string& text) {
    if (bytes_) return bytes_->push(ids, text);
    py::object listed =
        PyLong_Check(ids.ptr()) ? py::make_tuple(ids) : py::reinterpret_borrow<py::object>(ids);
    text = from_python(decoder_.attr("push")(listed));
  }
  void flush(std::string& text) {
    if (bytes_) return bytes_->finish(text);
    text = from_python(decoder_.attr("finish")());
  }
  // The text of the prompt's end that was not certain yet may come out with what follows.
  void drop_echo(std::string& text) {
    if (echo_.empty() || text.empty()) return;
    const auto ends = std::mismatch(text.begin(), text.end(), echo_.begin(), echo_.end());
    size_t common = ends.first - text.begin();
    if (common < text.size() && common < echo_.size()) {
      common = text::floor_character(text, common);
      echo_.clear();
    } else {
      echo_.erase(0, common);
    }
    text.erase(0, common);
  }

  std::optional<ByteDecoder> bytes_;  // in place: a step touches little memory for each sequence
  py::object decoder_;                // any other decoder
  std::string echo_;
};

// The text of one sequence, and its stop strings.
class TextStream {
 public:
  TextStream(py::object detokenizer, const std::vector<py::str>& stop, bool include_stop,
             const py::str& text)
      : stop_(stop),
        text_(std::make_shared<text::StopStrings>(encoded(stop)), include_stop, from_python(text)) {
    if (py::isinstance<StreamingDetokenizer>(detokenizer)) {
      own_.emplace(detokenizer.cast<const StreamingDetokenizer&>());
    } else {
      detokenizer_ = std::move(detokenizer);
    }
  }
  TextStream(const TextStream& other) : own_(other.own_), stop_(other.stop_), text_(other.text_) {
    if (!own_) detokenizer_ = other.detokenizer_.attr("copy")();
  }
  TextStream& operator=(const TextStream&) = delete;

  py::object append(py::handle ids, bool may_stop) {
    piece_.clear();
    if (own_) {
      own_->append(ids, piece_);
    } else {
      py::object listed =
          PyLong_Check(ids.ptr()) ? py::make_tuple(ids) : py::reinterpret_borrow<py::object>(ids);
      piece_ = from_python(detokenizer_.attr("append")(listed));
    }
    return stop_string(text_.extend(piece_, may_stop));
  }

  py::object finish() {
    if (text_.finished()) return py::none();
    piece_.clear();
    if (own_) {
      own_->finish(piece_);
    } else {
      piece_ = from_python(detokenizer_.attr("finish")());
    }
    py::object stop = stop_string(text_.extend(piece_));
    text_.finish();
    return stop;
  }

  py::object take() { return to_python(text_.take()); }
  py::object text() const { return to_python(text_.text()); }

 private:
  static std::vector<std::string> encoded(const std::vector<py::str>& strings) {
    std::vector<std::string> made;
    for (const py::str& s : strings) made.push_back(from_python(s));
    return made;
  }
  py::object stop_string(int index) const {
    return index < 0 ? py::object(py::none()) : py::object(stop_[index]);
  }

  std::optional<StreamingDetokenizer> own_;
  py::object detokenizer_;  // any other
  std::vector<py::str> stop_;
  text::StoppableText text_;
  std::string piece_;  // scratch
};

template <class T>
py::object finished(T& self) {
  std::string text;
  self.finish(text);
  return to_python(text);
}

}  // namespace

void bind_text(py::module_& m) {
  using py::arg;
  py::class_<ByteTable, std::shared_ptr<ByteTable>>(m, "ByteTable")
      .def(py::init<py::object>(), arg("lookup"))
      .def("__getitem__",
           [](ByteTable& self, py::handle token) { return py::bytes(self.of(token)); });
  py::class_<ByteDecoder>(m, "ByteDecoder")
      .def(py::init<std::shared_ptr<ByteTable>>(), arg("table"))
      .def("push",
           [](ByteDecoder& self, py::handle ids) {
             std::string text;
             self.push(ids, text);
             return to_python(text);
           })
      .def("finish", &finished<ByteDecoder>)
      .def("copy", [](const ByteDecoder& self) { return ByteDecoder(self); });
  py::class_<StreamingDetokenizer>(m, "StreamingDetokenizer")
      .def(py::init<py::object, py::handle>(), arg("decoder"), arg("prompt_ids"))
      .def("append",
           [](StreamingDetokenizer& self, py::handle ids) {
             std::string text;
             self.append(ids, text);
             return to_python(text);
           })
      .def("finish", &finished<StreamingDetokenizer>)
      .def("copy", [](const StreamingDetokenizer& self) { return StreamingDetokenizer(self); });
  py::class_<TextStream>(m, "TextStream")
      .def(py::init<py::object, const std::vector<py::str>&, bool, const py::str&>(),
           arg("detokenizer"), arg("stop"), arg("include_stop") = false, arg("text") = "")
      .def("append", &TextStream::append, arg("ids"), arg("may_stop") = true)
      .def("finish", &TextStream::finish)
      .def("take", &TextStream::take)
      .def("copy", [](const TextStream& self) { return TextStream(self); })
      .def_property_readonly("text", &TextStream::text);
  m.def(
      "wake",
      [](int fd) {
        const char byte = 0;
        // A full pipe has woken its reader already.
        [[maybe_unused]] const auto written = ::write(fd, &byte, 1);
      },
      arg("fd"));
}

}  // namespace pyengine::bindings
