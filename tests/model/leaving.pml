/* Leaving a group: a rank reuses the memory of its page when nobody reads it any more.
 *
 * csrc/transport/window.cpp (leave, all_left), csrc/group/{group,process}.cpp (retire). Ranks look at
 * each other's pages, post on the first one's, and leave; who has heard of all frees its page, whose
 * memory may then be anything. DIES: one rank dies at any moment.
 *
 * Asserted: nobody touches a page that was freed, and unless a rank died every page is in the end.
 *
 * Mutants: OWN_WORD LEAVE_EARLY FREE_AT_ONCE
 */
#ifndef N
#define N 2
#endif
#define NOBODY N

byte departed[N];
bool gone[N]; /* the page was freed; it may be anything by now */
bool said[N]; /* OWN_WORD: this rank has left, on its own page */
byte freed;

byte victim = NOBODY;
bool dead[N];

#define TOUCH(page) assert(!gone[page])

inline leave() {
  peer = 0;
  do
  :: peer == N -> break
  :: peer < N ->
     atomic { TOUCH(peer); departed[peer]++ };
     peer++
  od
}

proctype Rank(byte me) {
  byte peer = 0;
  {
#ifdef LEAVE_EARLY
    leave();
#endif
    /* The last operation: it reads every announcement; an error is posted on the first page. */
    peer = 0;
    do
    :: peer == N -> break
    :: peer < N -> TOUCH(peer); peer++
    od;
    if
    :: TOUCH(0)
    :: true
    fi;
#ifdef OWN_WORD
    /* Asking each peer's own word instead of being told. */
    said[me] = true;
    peer = 0;
    do
    :: peer == N -> break
    :: peer < N -> atomic { said[peer] -> TOUCH(peer) }; peer++
    od;
#else
#ifndef LEAVE_EARLY
    leave();
#endif
#ifndef FREE_AT_ONCE
    /* Not waited for: looked at whenever memory is asked for. */
    if
    :: departed[me] == N
    :: dead[0] || dead[N - 1] -> goto over /* who died never leaves: the page is kept */
    fi;
#endif
#endif
    atomic { TOUCH(me); gone[me] = true; freed++ };
over:
    skip
  } unless { dead[me] }
}

active proctype Killer() {
  if
  :: victim != NOBODY -> dead[victim] = true
  :: true
  fi
}

init {
  byte rank = 0;
  atomic {
#ifdef DIES
    if
    :: victim = 0
    :: victim = N - 1
    fi;
#endif
    do
    :: rank == N -> break
    :: rank < N -> run Rank(rank); rank++
    od
  };
  freed == N || dead[0] || dead[N - 1] /* else some page is kept for ever */
}
