// Linked into every C++ test: what the thread sanitizer must not report. Others do not call it.
//
// An exception of the progress thread is freed by whoever drops the last reference to it, and that
// may be the progress thread, after the waiting thread has read it. The count of the references
// orders the two, but it lies in libstdc++, which is not compiled for the sanitizer. So no race is
// reported in the destruction of an error; all others are.

extern "C" const char* __tsan_default_suppressions();

extern "C" const char* __tsan_default_suppressions() {
  return "race:pycomm::CommError::~CommError\n"
         "race:pycomm::nccl::RefusedError::~RefusedError\n"
         "race:std::runtime_error::~runtime_error\n";
}
