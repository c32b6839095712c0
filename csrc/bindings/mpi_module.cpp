#include <dlfcn.h>
#include <mpi.h>
#include <pybind11/pybind11.h>

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <memory>
#include <string>

#include "core/error.h"
#include "transport/channel.h"
#include "transport/channel_mpi.h"

namespace py = pybind11;

namespace pycomm {

namespace {

#if defined(OPEN_MPI)
constexpr const char* kBuiltFor = "Open MPI";
#else
constexpr const char* kBuiltFor = "MPICH or Intel MPI";
#endif

using GetLibraryVersion = int(char*, int*);

/// "/usr/lib/libmpi.so.40 (Open MPI v5.0.11)". Allowed before MPI_Init and in a library that is
/// never initialised: the one MPI function called before the libraries are known to be the same.
std::string library_name(const Dl_info& library, GetLibraryVersion* get_library_version) {
  // Not MPI_MAX_LIBRARY_VERSION_STRING: the library asked may be another than mpi.h describes, and
  // Open MPI's maximum (256) is exceeded by MPICH's text (maximum 8192).
  std::string version(1 << 14, '\0');
  int length = 0;
  get_library_version(version.data(), &length);
  version.resize(length);
  version.resize(std::min(version.find_first_of(",\n"), version.size()));  // drop build details
  const auto both_blank = [](char a, char b) { return a == ' ' && b == ' '; };
  version.erase(std::unique(version.begin(), version.end(), both_blank), version.end());
  return std::string(library.dli_fname) + " (" + version + ")";
}

/// Two MPIs in one process corrupt each other's handles, so this comes before any other MPI call.
///
/// This module names its library by soname only, without rpath: the loader gives it the library of
/// that soname which mpi4py has loaded already, or else searches for one, which is then another
/// file. What decides is where the symbols lead. The PMPI name is asked for, because profiling
/// tools put themselves before the MPI one.
void require_library_of_mpi4py(const py::module_& mpi4py) {
  const auto file = mpi4py.attr("__file__").cast<std::string>();
  void* extension = dlopen(file.c_str(), RTLD_LAZY | RTLD_NOLOAD);
  void* symbol = extension ? dlsym(extension, "PMPI_Get_library_version") : nullptr;
  Dl_info theirs{};
  if (!symbol || !dladdr(symbol, &theirs)) {
    throw CommError("init: cannot tell which MPI library mpi4py (" + file +
                    ") uses.\n  Reinstall mpi4py.");
  }
  // dlopen of what is loaded already only counted a reference; mpi4py holds its own.
  dlclose(extension);

  auto* get_version = &PMPI_Get_library_version;
  Dl_info ours{};
  dladdr(reinterpret_cast<void*>(get_version), &ours);

  // The size of a handle tells the ABIs apart (an int in MPICH, a pointer in Open MPI), should a
  // preloaded library have captured this module's symbols.
  const auto handle_bytes = mpi4py.attr("_sizeof")(mpi4py.attr("Comm")).cast<std::size_t>();
  if (theirs.dli_fbase == ours.dli_fbase && handle_bytes == sizeof(MPI_Comm)) return;

  auto* their_version = reinterpret_cast<GetLibraryVersion*>(symbol);
  throw CommError(
      std::string("init: pycomm was built for ") + kBuiltFor + " and is bound to " +
      library_name(ours, get_version) + ", but mpi4py loaded " +
      library_name(theirs, their_version) +
      ": two MPI installations are mixed.\n  Put the mpicc of the one you want first on "
      "PATH and reinstall pycomm-torch, or set MPI4PY_LIBMPI to pycomm's library.");
}

std::string thread_level_name(int level) {
  switch (level) {
    case MPI_THREAD_SINGLE:
      return "SINGLE";
    case MPI_THREAD_FUNNELED:
      return "FUNNELED";
    case MPI_THREAD_SERIALIZED:
      return "SERIALIZED";
    case MPI_THREAD_MULTIPLE:
      return "MULTIPLE";
  }
  return std::to_string(level);
}

void require_running_with_threads() {
  int initialized = 0;
  int finalized = 0;
  MPI_Initialized(&initialized);
  MPI_Finalized(&finalized);
  if (!initialized || finalized) {
    throw CommError(std::string("init: MPI is ") +
                    (finalized ? "finalised already.\n  Call pycomm.init() before MPI.Finalize()."
                               : "not initialised.\n  Call MPI.Init_thread() before pycomm.init(), "
                                 "or leave mpi4py.rc.initialize True."));
  }
  int level = MPI_THREAD_SINGLE;
  MPI_Query_thread(&level);
  if (level < MPI_THREAD_MULTIPLE) {
    throw CommError("init: MPI runs at thread level " + thread_level_name(level) +
                    ", but with several hosts pycomm's progress thread calls it beside the main "
                    "thread, which needs MULTIPLE.\n  Set mpi4py.rc.thread_level = \"multiple\" "
                    "before the first import of mpi4py.MPI.");
  }
}

std::shared_ptr<MpiChannel> make_channel(const py::object& comm) {
  const auto mpi4py = py::module_::import("mpi4py.MPI");
  require_library_of_mpi4py(mpi4py);
  require_running_with_threads();
  if (!py::isinstance(comm, mpi4py.attr("Intracomm"))) {
    throw InvalidArgumentError("init: comm is " + py::repr(comm).cast<std::string>() +
                               ", not an intra-communicator of mpi4py.\n  Pass MPI.COMM_WORLD or "
                               "what its Split() or Dup() returned.");
  }
  // mpi4py gives the address of the handle it stores, so its C headers are not needed.
  const auto address = mpi4py.attr("_addressof")(comm).cast<std::uintptr_t>();
  const MPI_Comm communicator = *reinterpret_cast<const MPI_Comm*>(address);
  if (communicator == MPI_COMM_NULL) {
    throw InvalidArgumentError(
        "init: comm is MPI.COMM_NULL: this process is not one of its ranks.\n  Call pycomm.init() "
        "only on ranks that hold the communicator.");
  }
  py::gil_scoped_release waits_for_all_ranks;
  return std::make_shared<MpiChannel>(communicator);
}

}  // namespace

}  // namespace pycomm

PYBIND11_MODULE(_mpi, m) {
  py::module_::import("pycomm._core");  // registers Channel and the translation of errors
  py::class_<pycomm::MpiChannel, pycomm::Channel, std::shared_ptr<pycomm::MpiChannel>>(
      m, "MpiChannel");
  m.def("make_channel", &pycomm::make_channel, py::arg("comm"));
}
