// A test harness of one page: TEST(name) { CHECK(...); } in a file that includes this one; main()
// is here.
#pragma once

#include <cstdio>
#include <cstdlib>
#include <exception>
#include <sstream>
#include <stdexcept>
#include <string>
#include <vector>

namespace pyengine::test {

struct Failure : std::runtime_error {
  using std::runtime_error::runtime_error;
};

[[noreturn]] inline void fail(const char* file, int line, const std::string& what) {
  throw Failure(std::string(file) + ":" + std::to_string(line) + ": " + what);
}

struct Case {
  const char* name;
  void (*run)();
};

inline std::vector<Case>& cases() {
  static std::vector<Case> all;
  return all;
}

struct Registration {
  Registration(const char* name, void (*run)()) { cases().push_back({name, run}); }
};

template <class A, class B>
void check_equal(const A& a, const B& b, const char* text, const char* file, int line) {
  if (a == b) return;
  std::ostringstream message;
  message << text << ": " << a << " != " << b;
  fail(file, line, message.str());
}

inline int run_all() {
  int failed = 0;
  for (const Case& c : cases()) {
    try {
      c.run();
      std::printf("ok    %s\n", c.name);
    } catch (const std::exception& e) {
      std::printf("FAIL  %s\n      %s\n", c.name, e.what());
      ++failed;
    }
    std::fflush(stdout);
    if (failed > 0 && std::getenv("PYENGINE_TEST_FAIL_FAST") != nullptr) break;
  }
  return failed == 0 ? 0 : 1;
}

}  // namespace pyengine::test

#define TEST(name)                                                            \
  static void name();                                                         \
  static const pyengine::test::Registration name##_registration(#name, name); \
  static void name()

#define CHECK(condition)                                                    \
  do {                                                                      \
    if (!(condition)) pyengine::test::fail(__FILE__, __LINE__, #condition); \
  } while (false)

#define CHECK_EQ(a, b) pyengine::test::check_equal((a), (b), #a " == " #b, __FILE__, __LINE__)

// The expression throws `type`, and the message contains `part`.
#define CHECK_THROWS(expression, type, part)                                             \
  do {                                                                                   \
    std::string caught;                                                                  \
    try {                                                                                \
      (void)(expression);                                                                \
    } catch (const type& e) {                                                            \
      caught = e.what();                                                                 \
    }                                                                                    \
    if (caught.empty()) pyengine::test::fail(__FILE__, __LINE__, "no " #type " thrown"); \
    if (caught.find(part) == std::string::npos) {                                        \
      pyengine::test::fail(__FILE__, __LINE__, "unexpected message: " + caught);         \
    }                                                                                    \
  } while (false)

int main() { return pyengine::test::run_all(); }
