// AMX tiles: whether the processor has them and the operating system lets this process use them.
#pragma once

namespace pyengine::cpu {

// Asks Linux for the tiles on the first call (they need 8 KB more of every thread's saved state).
bool amx_permitted();

}  // namespace pyengine::cpu
