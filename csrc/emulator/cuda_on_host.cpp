#include "csrc/emulator/cuda_on_host.h"

#include <algorithm>
#include <exception>
#include <list>
#include <map>
#include <memory>
#include <numeric>
#include <random>
#include <set>
#include <unordered_map>
#include <utility>

#include <ucontext.h>

namespace pydetox::emulator {
namespace {

constexpr std::size_t kStackBytes = 64 * 1024;
constexpr std::size_t kSectorBytes = 32;  // what the L2 of an NVIDIA GPU asks of DRAM
constexpr unsigned kWarpSize = 32;

enum class State { kReady, kAtBlockBarrier, kAtWarpBarrier, kDone };

struct Fiber {
  ucontext_t context;
  std::unique_ptr<char[]> stack;
  Dim3 index;
  State state;
  int line;       // where it waits
  unsigned mask;  // lanes it waits for, at a warp barrier
};

// Fully associative, least recently used out first.
class Cache {
 public:
  explicit Cache(std::size_t bytes) : capacity_(bytes / kSectorBytes) {}

  bool touch(std::uintptr_t sector) {
    const auto found = where_.find(sector);
    const bool hit = found != where_.end();
    if (hit) {
      order_.splice(order_.begin(), order_, found->second);
    } else if (capacity_ > 0) {
      order_.push_front(sector);
      where_[sector] = order_.begin();
      if (order_.size() > capacity_) {
        where_.erase(order_.back());
        order_.pop_back();
      }
    }
    return hit;
  }

 private:
  std::size_t capacity_;
  std::list<std::uintptr_t> order_;
  std::unordered_map<std::uintptr_t, std::list<std::uintptr_t>::iterator> where_;
};

std::string at(const Dim3& d) {
  return "(" + std::to_string(d.x) + "," + std::to_string(d.y) + "," + std::to_string(d.z) + ")";
}

class Machine {
 public:
  Machine(const Launch& launch, const Schedule& schedule, const std::function<void()>& kernel)
      : launch_(launch),
        schedule_(schedule),
        kernel_(kernel),
        random_(schedule.seed),
        cache_(schedule.cache_bytes) {
    const Dim3& b = launch.block;
    const std::size_t threads = std::size_t{b.x} * b.y * b.z;
    if (threads == 0 || threads > 1024)
      fail("a block has 1 to 1024 threads, not " + std::to_string(threads));
    if (launch.grid.x == 0 || launch.grid.y == 0 || launch.grid.z == 0) fail("empty grid");
    if (launch.grid.x > 0x7fffffffu || launch.grid.y > 65535 || launch.grid.z > 65535)
      fail("grid too large");
    fibers_.resize(threads);
    for (std::size_t i = 0; i < threads; ++i) {
      fibers_[i].stack = std::make_unique<char[]>(kStackBytes);
      fibers_[i].index = {static_cast<unsigned>(i % b.x), static_cast<unsigned>(i / b.x % b.y),
                          static_cast<unsigned>(i / b.x / b.y)};
    }
    slots_.resize((threads + kWarpSize - 1) / kWarpSize * kWarpSize);
    shared_.resize(launch.shared_bytes / sizeof(std::max_align_t) +
                   2);  // at least one spare element as a fence
  }

  Traffic run() {
    const Dim3& g = launch_.grid;
    std::vector<std::size_t> order(std::size_t{g.x} * g.y * g.z);
    std::iota(order.begin(), order.end(), std::size_t{0});
    if (schedule_.only_block) {
      const std::int64_t only = *schedule_.only_block;
      order = {only < 0 ? order.size() - static_cast<std::size_t>(-only)
                        : static_cast<std::size_t>(only)};
    }
    if (schedule_.seed != 0) std::shuffle(order.begin(), order.end(), random_);
    gridDim = g;
    blockDim = launch_.block;
    for (const std::size_t block : order) {
      blockIdx = {static_cast<unsigned>(block % g.x), static_cast<unsigned>(block / g.x % g.y),
                  static_cast<unsigned>(block / g.x / g.y)};
      run_block();
    }
    traffic_.barriers.assign(barriers_.begin(), barriers_.end());
    return traffic_;
  }

  [[noreturn]] void fail(const std::string& what) const {
    std::string where = launch_.kernel;
    if (current_ < fibers_.size())
      where += ", block " + at(blockIdx) + " thread " + at(fibers_[current_].index);
    throw KernelError(where + ": " + what);
  }

  void access(const void* address, std::size_t bytes, bool store) {
    const auto begin = reinterpret_cast<std::uintptr_t>(address);
    const std::string verb = store ? "stores" : "loads";
    if (begin % std::min<std::size_t>(bytes, 16) != 0)
      fail(verb + " " + std::to_string(bytes) + " bytes misaligned");
    // A tensor may be an input and a result, too.
    const Range* range = nullptr;
    for (const Range& r : launch_.memory) {
      const auto first = reinterpret_cast<std::uintptr_t>(r.begin);
      if (begin < first || begin + bytes > first + r.bytes) continue;
      range = &r;
      if (r.writable) break;
    }
    if (range == nullptr) fail(verb + " " + std::to_string(bytes) + " bytes out of bounds");
    if (store && !range->writable) fail("stores to the input " + range->name);
    ++(store ? traffic_.stores : traffic_.loads);
    (store ? traffic_.bytes_stored : traffic_.bytes_loaded) += static_cast<std::int64_t>(bytes);
    if (schedule_.cache_bytes > 0) {
      for (auto s = begin / kSectorBytes; s <= (begin + bytes - 1) / kSectorBytes; ++s) {
        if (!cache_.touch(s) && !store) traffic_.dram_bytes_read += kSectorBytes;
      }
    }
    if (schedule_.seed != 0 && random_() % 8 == 0) wait(State::kReady, 0);
  }

  void block_barrier(int line) {
    barriers_.insert(line);
    if (schedule_.dropped_barrier == kDropAll || schedule_.dropped_barrier == line) return;
    wait(State::kAtBlockBarrier, line);
  }

  void warp_barrier(unsigned mask, int line) {
    if (!(mask >> lane() & 1u))
      fail("line " + std::to_string(line) + ": a lane outside of its own warp mask");
    fibers_[current_].mask = mask;
    wait(State::kAtWarpBarrier, line);
  }

  unsigned lane() const { return static_cast<unsigned>(current_ % kWarpSize); }
  std::uint64_t* warp_slots() { return slots_.data() + current_ / kWarpSize * kWarpSize; }
  void* shared() { return shared_.data(); }

 private:
  static void enter();  // first function of every fiber

  void wait(State state, int line) {
    Fiber& self = fibers_[current_];
    self.state = state;
    self.line = line;
    swapcontext(&self.context, &scheduler_);
    threadIdx = self.index;
  }

  void run_block() {
    const std::size_t bytes = shared_.size() * sizeof(std::max_align_t);
    std::memset(shared_.data(), 0xff, bytes);
    for (Fiber& fiber : fibers_) {
      fiber.state = State::kReady;
      getcontext(&fiber.context);
      fiber.context.uc_stack.ss_sp = fiber.stack.get();
      fiber.context.uc_stack.ss_size = kStackBytes;
      fiber.context.uc_link = &scheduler_;
      makecontext(&fiber.context, &Machine::enter, 0);
    }
    while (resume_ready_fibers()) release_block_barrier();
    const auto* raw = reinterpret_cast<const unsigned char*>(shared_.data());
    if (!std::all_of(raw + launch_.shared_bytes, raw + bytes,
                     [](unsigned char c) { return c == 0xff; })) {
      fail("writes past its " + std::to_string(launch_.shared_bytes) +
           " bytes of dynamic shared memory");
    }
  }

  // Runs fibers until none is ready; true if some wait.
  bool resume_ready_fibers() {
    std::vector<std::size_t> ready;
    for (std::size_t i = 0; i < fibers_.size(); ++i) {
      if (fibers_[i].state == State::kReady) ready.push_back(i);
    }
    while (!ready.empty()) {
      const std::size_t pick = schedule_.seed == 0 ? ready.size() - 1 : random_() % ready.size();
      current_ = ready[pick];
      threadIdx = fibers_[current_].index;
      swapcontext(&scheduler_, &fibers_[current_].context);
      if (error_) std::rethrow_exception(std::exchange(error_, nullptr));
      if (fibers_[current_].state != State::kReady) {
        ready[pick] = ready.back();
        ready.pop_back();
      }
      if (fibers_[current_].state == State::kAtWarpBarrier) release_warp_barrier(ready);
    }
    current_ = fibers_.size();
    return std::any_of(fibers_.begin(), fibers_.end(),
                       [](const Fiber& f) { return f.state != State::kDone; });
  }

  // The current fiber has reached a warp barrier: when all lanes of its mask have, they go on.
  void release_warp_barrier(std::vector<std::size_t>& ready) {
    const Fiber& self = fibers_[current_];
    const std::size_t first = current_ / kWarpSize * kWarpSize;
    std::vector<std::size_t> lanes;
    for (unsigned i = 0; i < kWarpSize; ++i) {
      if (self.mask >> i & 1u) lanes.push_back(first + i);
    }
    for (const std::size_t i : lanes) {
      if (i >= fibers_.size())
        fail("line " + std::to_string(self.line) + ": the warp mask names absent lanes");
      const Fiber& f = fibers_[i];
      if (f.state != State::kAtWarpBarrier || f.line != self.line || f.mask != self.mask) return;
    }
    for (const std::size_t i : lanes) {
      fibers_[i].state = State::kReady;
      ready.push_back(i);
    }
  }

  // Nobody can run: either all threads stand at one and the same barrier, or the block would hang
  // or misbehave.
  void release_block_barrier() {
    std::map<std::string, int> places;
    for (const Fiber& f : fibers_) {
      const std::string line = " at line " + std::to_string(f.line);
      ++places[f.state == State::kDone             ? "have returned"
               : f.state == State::kAtBlockBarrier ? "wait in __syncthreads" + line
                                                   : "wait in a warp operation" + line];
    }
    if (places.size() > 1 || fibers_[0].state != State::kAtBlockBarrier) {
      std::string message = "divergent barrier in block " + at(blockIdx) + ":";
      for (const auto& [place, count] : places)
        message += " " + std::to_string(count) + " threads " + place + ",";
      message.back() = '.';
      fail(message);
    }
    for (Fiber& f : fibers_) f.state = State::kReady;
  }

  const Launch& launch_;
  const Schedule& schedule_;
  const std::function<void()>& kernel_;
  std::mt19937_64 random_;
  Cache cache_;
  Traffic traffic_;
  std::set<int> barriers_;
  std::vector<Fiber> fibers_;
  std::vector<std::uint64_t> slots_;
  std::vector<std::max_align_t> shared_;
  std::size_t current_ = static_cast<std::size_t>(-1);
  ucontext_t scheduler_;
  std::exception_ptr error_;
};

Machine* machine = nullptr;

void Machine::enter() {
  // An exception must not leave the fiber's own stack.
  try {
    machine->kernel_();
  } catch (...) {
    machine->error_ = std::current_exception();
  }
  machine->fibers_[machine->current_].state = State::kDone;
}

}  // namespace

Traffic emulate(const Launch& launch, const Schedule& schedule,
                const std::function<void()>& kernel) {
  Machine here(launch, schedule, kernel);
  machine = &here;
  return here.run();
}

void fail(const std::string& what) { machine->fail(what); }
void on_load(const void* address, std::size_t bytes) { machine->access(address, bytes, false); }
void on_store(const void* address, std::size_t bytes) { machine->access(address, bytes, true); }
void block_barrier(int line) { machine->block_barrier(line); }
void warp_barrier(unsigned mask, int line) { machine->warp_barrier(mask, line); }
void* shared_memory() { return machine->shared(); }
std::uint64_t* warp_slots() { return machine->warp_slots(); }
unsigned lane() { return machine->lane(); }

}  // namespace pydetox::emulator
