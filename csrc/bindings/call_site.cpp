#include "bindings/call_site.h"

#include <pybind11/pybind11.h>

#include <algorithm>
#include <string>
#include <string_view>
#include <unordered_map>
#include <utility>
#include <vector>

namespace pycomm {
namespace {

namespace py = pybind11;

/// Code that a program makes and forgets (torch.compile does) must not fill the memory.
constexpr std::size_t kMostPlaces = 1 << 14;

/// An instruction of a code object. The code object is kept, or another could get its address.
struct Place {
  PyObject* code;
  int position;
  bool operator==(const Place&) const = default;
};

struct HashOfPlace {
  std::size_t operator()(const Place& place) const {
    return std::hash<PyObject*>()(place.code) * 31 + static_cast<std::size_t>(place.position);
  }
};

/// All of this is used under Python's lock, and never destroyed: texts live to the end.
struct Sites {
  std::vector<std::string> hidden;
  std::unordered_map<Place, std::string, HashOfPlace> texts;  // empty: not the user's
};

Sites& sites() {
  static auto* const all = new Sites;
  return *all;
}

/// The last two parts of a path tell files apart and leave room for what happened there.
std::string short_path(std::string_view path) {
  const std::size_t name = path.rfind('/');
  if (name == std::string_view::npos || name == 0) return std::string(path);
  const std::size_t folder = path.rfind('/', name - 1);
  return std::string(path.substr(folder == std::string_view::npos ? 0 : folder + 1));
}

int position_in(PyFrameObject* frame) {
#if PY_VERSION_HEX >= 0x030B0000
  return PyFrame_GetLasti(frame);
#else
  return PyFrame_GetLineNumber(frame);
#endif
}

std::string text_of(PyFrameObject* frame, PyObject* code) {
  const auto file = py::reinterpret_steal<py::object>(PyObject_GetAttrString(code, "co_filename"));
  Py_ssize_t length = 0;
  const char* const path = file ? PyUnicode_AsUTF8AndSize(file.ptr(), &length) : nullptr;
  if (path == nullptr) {  // a name that is no text
    PyErr_Clear();
    return "";
  }
  const std::string_view name(path, static_cast<std::size_t>(length));
  const auto& hidden = sites().hidden;
  if (std::any_of(hidden.begin(), hidden.end(),
                  [&](const std::string& folder) { return name.starts_with(folder); })) {
    return "";
  }
  return short_path(name) + ":" + std::to_string(PyFrame_GetLineNumber(frame));
}

const std::string* site_of(PyFrameObject* frame) {
  auto& texts = sites().texts;
  const auto code =
      py::reinterpret_steal<py::object>(reinterpret_cast<PyObject*>(PyFrame_GetCode(frame)));
  const Place place{code.ptr(), position_in(frame)};
  auto known = texts.find(place);
  if (known == texts.end()) {
    if (texts.size() >= kMostPlaces) return nullptr;
    Py_INCREF(place.code);
    known = texts.emplace(place, text_of(frame, place.code)).first;
  }
  return &known->second;
}

}  // namespace

const char* call_site() {
  auto frame = py::reinterpret_borrow<py::object>(reinterpret_cast<PyObject*>(PyEval_GetFrame()));
  while (frame) {
    auto* const at = reinterpret_cast<PyFrameObject*>(frame.ptr());
    const std::string* const site = site_of(at);
    if (site == nullptr) return nullptr;
    if (!site->empty()) return site->c_str();
    frame = py::reinterpret_steal<py::object>(reinterpret_cast<PyObject*>(PyFrame_GetBack(at)));
  }
  return nullptr;
}

void hide_frames_of(std::vector<std::string> folders) { sites().hidden = std::move(folders); }

}  // namespace pycomm
