#pragma once

#include <string>
#include <string_view>
#include <vector>

namespace pycomm::nccl {

/// A shared library that this process uses without being linked to it: libcudart, libnccl. It stays
/// loaded to the end of the process, since its threads cannot be told to go.
class Library {
 public:
  /// Where to look, in this order; the first place that has it decides.
  struct Search {
    /// What it is, for errors: "NCCL".
    std::string name;
    /// The environment variable that names the file. If it is set, nothing else counts.
    std::string override_variable;
    /// Of the versions that will do, the preferred one first. A copy that the process has loaded
    /// already (PyTorch's, hidden from symbol lookup or not) is known by its soname.
    std::vector<std::string> sonames;
    /// Of wheels: the dynamic loader does not know them.
    std::vector<std::string> folders;
    /// What to do if it is nowhere.
    std::string remedy;
  };

  /// @throws CommError  names every place that was searched and what was wrong there.
  static Library find(const Search& search);

  /// The file, as the loader knows it.
  const std::string& path() const { return path_; }
  /// Which place of the search had it: "already loaded".
  std::string_view origin() const { return origin_; }
  /// null: the library has no such symbol.
  void* symbol(const char* name) const;

 private:
  Library(void* handle, std::string_view origin);

  void* handle_;
  std::string path_;
  std::string_view origin_;
};

}  // namespace pycomm::nccl
