#include "nccl/library.h"

#include <dlfcn.h>
#include <link.h>
#include <unistd.h>

#include <cstdlib>
#include <utility>

#include "core/error.h"

namespace pycomm::nccl {
namespace {

constexpr int kMode = RTLD_NOW | RTLD_LOCAL;

std::string loader_says() {
  const char* const text = dlerror();
  return text != nullptr ? text : "no reason given";
}

std::string joined(const std::vector<std::string>& parts, const char* separator) {
  std::string text;
  for (const std::string& part : parts) text += (text.empty() ? "" : separator) + part;
  return text;
}

}  // namespace

Library::Library(void* handle, std::string_view origin) : handle_(handle), origin_(origin) {
  link_map* map = nullptr;
  if (dlinfo(handle, RTLD_DI_LINKMAP, &map) == 0 && map != nullptr) path_ = map->l_name;
}

void* Library::symbol(const char* name) const { return dlsym(handle_, name); }

Library Library::find(const Search& search) {
  const std::string& variable = search.override_variable;
  const char* const named = std::getenv(variable.c_str());
  if (named != nullptr && *named != '\0') {  // whose file would be this program itself
    if (void* const handle = dlopen(named, kMode)) return {handle, "named by the environment"};
    throw CommError(search.name + ": " + variable + "=" + named +
                    " cannot be loaded, and nothing else was tried: " + loader_says() +
                    ".\n  Name the library's file, or unset " + variable + ".");
  }
  for (const std::string& soname : search.sonames) {
    if (void* const handle = dlopen(soname.c_str(), kMode | RTLD_NOLOAD)) {
      return {handle, "already loaded"};
    }
  }
  std::vector<std::string> problems;
  for (const std::string& folder : search.folders) {
    for (const std::string& soname : search.sonames) {
      const std::string file = folder + "/" + soname;
      if (access(file.c_str(), F_OK) != 0) continue;
      if (void* const handle = dlopen(file.c_str(), kMode)) return {handle, "from a wheel"};
      problems.push_back("the dynamic loader refuses the wheel's: " + loader_says());
    }
  }
  for (const std::string& soname : search.sonames) {
    if (void* const handle = dlopen(soname.c_str(), kMode)) {
      return {handle, "found by the dynamic loader"};
    }
  }
  const std::string sonames = joined(search.sonames, ", ");
  std::string text = search.name + ": none was found. " + variable +
                     " is not set; this process has not loaded " + sonames + "; " +
                     (search.folders.empty() ? "no wheel brings one"
                                             : "searched " + joined(search.folders, ", ")) +
                     " and the dynamic loader's own places";
  for (const std::string& problem : problems) text += "; " + problem;
  throw CommError(text + ".\n  " + search.remedy);
}

}  // namespace pycomm::nccl
