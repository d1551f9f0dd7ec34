// linkemu: a link between two network namespaces, in user space.
//
// Each end is a TUN device in one of the namespaces. Every IP packet read from one is put through the link's model and
// written to the other when its time has come. No kernel module beyond tun is needed.
//
//   cc -O2 -pthread -o linkemu linkemu.c -lm
//   linkemu ns_a=robot ns_b=server ip_a=10.99.0.1 ip_b=10.99.0.2 delay=10 rate=100 loss=1
//
// Only at the start: ns_a, ns_b (names below /run/netns), ip_a, ip_b, dev_a, dev_b (names of the devices), mtu.
// At the start and while it runs, for both directions, or for one with the suffix _ab or _ba:
//   delay        one way, ms
//   jitter       ms; each packet's delay is uniform in delay +- jitter
//   reorder      1: jitter may put packets out of order; 0: it may not
//   rate         Mbit/s of IP packets; 0: no limit
//   buffer       ms of the rate that may wait before the link; what would wait longer is dropped
//   loss         percent, each packet by itself
//   burst_loss   percent during a burst, in place of `loss`
//   burst_ms     how long a burst lasts
//   burst_every  mean ms between the end of a burst and the start of the next (exponential); 0: no bursts
//   seed         of all that is random
//
// Standard input takes lines: `key=value ...` is answered by {"ok":true} or {"error":...}; `stats` by one line of
// JSON with what happened since the last `stats`. The end of standard input ends the program, so that a link never
// outlives what made it. "ready" is printed once both devices are up.
#define _GNU_SOURCE
#include <arpa/inet.h>
#include <errno.h>
#include <fcntl.h>
#include <linux/if_tun.h>
#include <math.h>
#include <net/if.h>
#include <pthread.h>
#include <sched.h>
#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/prctl.h>
#include <time.h>
#include <unistd.h>

#define MAX_MTU 9000
#define MAX_IN_FLIGHT 65536        // packets per direction
#define LATE_BUCKETS 4096          // of 10 us each
#define LATE_BUCKET_NS 10000
#define DEVICE_QUEUE 4096          // packets that may wait for the reader

typedef struct {
  double delay, jitter, reorder, rate, buffer, loss, burst_loss, burst_ms, burst_every;
} Model;

static const struct { const char *name; size_t offset; double max; } FIELDS[] = {
    {"delay", offsetof(Model, delay), 60e3},
    {"jitter", offsetof(Model, jitter), 60e3},
    {"reorder", offsetof(Model, reorder), 1},
    {"rate", offsetof(Model, rate), 1e6},
    {"buffer", offsetof(Model, buffer), 60e3},
    {"loss", offsetof(Model, loss), 100},
    {"burst_loss", offsetof(Model, burst_loss), 100},
    {"burst_ms", offsetof(Model, burst_ms), 60e3},
    {"burst_every", offsetof(Model, burst_every), 1e9},
};

typedef struct {
  int64_t due;                     // ns; packets leave in the order of (due, number)
  uint64_t number;
  int length;
  uint8_t *data;
} Packet;

typedef struct {
  uint64_t received, received_bytes, sent, sent_bytes, lost, dropped, failed, bursts;
  uint64_t late[LATE_BUCKETS];     // how long after its time a packet was written
} Counters;

typedef struct {
  int in, out;
  pthread_mutex_t lock;            // guards all below
  pthread_cond_t earlier;          // the packet that is due first is another one
  Model model;
  uint64_t random;
  bool in_burst;
  int64_t burst_changes;           // when the burst ends, or the next one starts; 0: not drawn yet
  int64_t link_free;               // when the last accepted packet has been put on the link
  int64_t last_due;
  uint64_t next_number;
  Packet *heap;
  int in_flight;
  uint8_t **spare;                 // buffers that hold no packet
  int spares;
  Counters counters;
} Direction;

static Direction directions[2];    // a to b, b to a
static int mtu = 1500;

static void die(const char *what) {
  perror(what);
  exit(1);
}

static int64_t now(void) {
  struct timespec t;
  clock_gettime(CLOCK_MONOTONIC, &t);
  return t.tv_sec * 1000000000LL + t.tv_nsec;
}

// ---- Chance ---------------------------------------------------------------------------------------------------------

static double uniform(Direction *d) {  // [0, 1), splitmix64
  uint64_t x = d->random += 0x9E3779B97F4A7C15ULL;
  x = (x ^ x >> 30) * 0xBF58476D1CE4E5B9ULL;
  x = (x ^ x >> 27) * 0x94D049BB133111EBULL;
  return (double)((x ^ x >> 31) >> 11) / 9007199254740992.0;
}

static int64_t until_burst(Direction *d) {
  return 1 - (int64_t)(log(1 - uniform(d)) * d->model.burst_every * 1e6);
}

static bool is_lost(Direction *d, int64_t t) {
  const Model *m = &d->model;
  if (m->burst_every == 0) {
    d->in_burst = false;
    d->burst_changes = 0;
  } else {
    if (d->burst_changes == 0) d->burst_changes = t + until_burst(d);
    while (t >= d->burst_changes) {
      d->in_burst = !d->in_burst;
      d->counters.bursts += d->in_burst;
      d->burst_changes += d->in_burst ? 1 + (int64_t)(m->burst_ms * 1e6) : until_burst(d);
    }
  }
  return uniform(d) * 100 < (d->in_burst ? m->burst_loss : m->loss);
}

// ---- The packets on their way, ordered by when they are due ---------------------------------------------------------

static bool before(const Packet *a, const Packet *b) {
  return a->due < b->due || (a->due == b->due && a->number < b->number);
}

static void push(Direction *d, Packet packet) {
  int i = d->in_flight++;
  for (int parent; i && before(&packet, &d->heap[parent = (i - 1) / 2]); i = parent) d->heap[i] = d->heap[parent];
  d->heap[i] = packet;
}

static Packet pop(Direction *d) {
  Packet first = d->heap[0], last = d->heap[--d->in_flight];
  int i = 0;
  for (int child; (child = 2 * i + 1) < d->in_flight; i = child) {
    if (child + 1 < d->in_flight && before(&d->heap[child + 1], &d->heap[child])) child++;
    if (!before(&d->heap[child], &last)) break;
    d->heap[i] = d->heap[child];
  }
  d->heap[i] = last;
  return first;
}

// ---- One direction: a thread that reads, and one that writes --------------------------------------------------------

// When the packet that arrived at `t` is to be written; -1: never.
static int64_t due(Direction *d, int64_t t, int length) {
  const Model *m = &d->model;
  int64_t start = m->rate > 0 && d->link_free > t ? d->link_free : t;
  if (start - t > (int64_t)(m->buffer * 1e6) || !d->spares) {
    d->counters.dropped++;
    return -1;
  }
  if (m->rate > 0) t = d->link_free = start + (int64_t)(length * 8000.0 / m->rate);
  if (is_lost(d, t)) {             // after the bottleneck: a lost packet has used the link
    d->counters.lost++;
    return -1;
  }
  t += (int64_t)((m->delay + m->jitter * (2 * uniform(d) - 1)) * 1e6);
  if (m->reorder == 0 && t < d->last_due) t = d->last_due;
  return d->last_due = t;
}

static void be_prompt(void) {
  struct sched_param priority = {.sched_priority = 10};
  prctl(PR_SET_TIMERSLACK, 1UL);
  pthread_setschedparam(pthread_self(), SCHED_FIFO, &priority);  // refused in some containers; then it is less exact
}

static _Noreturn void *read_packets(void *argument) {
  Direction *d = argument;
  uint8_t packet[MAX_MTU];
  be_prompt();
  for (;;) {
    ssize_t length = read(d->in, packet, mtu);
    if (length < 0 && errno == EINTR) continue;
    if (length < 0) die("cannot read from the device");
    int64_t arrived = now();
    pthread_mutex_lock(&d->lock);
    d->counters.received++;
    d->counters.received_bytes += length;
    int64_t at = due(d, arrived, length);
    bool is_first = false;
    if (at >= 0) {
      Packet p = {at, d->next_number++, length, d->spare[--d->spares]};
      memcpy(p.data, packet, length);
      push(d, p);
      is_first = d->heap[0].number == p.number;
    }
    pthread_mutex_unlock(&d->lock);
    if (is_first) pthread_cond_signal(&d->earlier);
  }
}

static _Noreturn void *write_packets(void *argument) {
  Direction *d = argument;
  be_prompt();
  pthread_mutex_lock(&d->lock);
  for (;;) {
    if (!d->in_flight) {
      pthread_cond_wait(&d->earlier, &d->lock);
      continue;
    }
    int64_t first = d->heap[0].due;
    if (first > now()) {
      struct timespec until = {first / 1000000000, first % 1000000000};
      pthread_cond_timedwait(&d->earlier, &d->lock, &until);
      continue;
    }
    Packet p = pop(d);
    pthread_mutex_unlock(&d->lock);
    bool written = write(d->out, p.data, p.length) == p.length;
    int64_t late = (now() - p.due) / LATE_BUCKET_NS;
    pthread_mutex_lock(&d->lock);
    if (written) {
      d->counters.sent++;
      d->counters.sent_bytes += p.length;
    } else {
      d->counters.failed++;
    }
    d->counters.late[late < LATE_BUCKETS ? late : LATE_BUCKETS - 1]++;
    d->spare[d->spares++] = p.data;
  }
}

static void start_direction(Direction *d, int in, int out) {
  d->in = in;
  d->out = out;
  d->heap = malloc(MAX_IN_FLIGHT * sizeof *d->heap);
  d->spare = malloc(MAX_IN_FLIGHT * sizeof *d->spare);
  uint8_t *memory = malloc((size_t)MAX_IN_FLIGHT * mtu);  // touched, and so taken, only as far as it is used
  if (!d->heap || !d->spare || !memory) die("malloc");
  for (int i = MAX_IN_FLIGHT; i-- > 0;) d->spare[d->spares++] = memory + (size_t)i * mtu;
  pthread_t thread;
  if (pthread_create(&thread, NULL, read_packets, d) || pthread_create(&thread, NULL, write_packets, d)) die("threads");
}

// ---- Options, statistics and devices --------------------------------------------------------------------------------

// Sets what `option`, of the form key=value, says; false: it cannot be used.
static bool change(const char *option) {
  char key[32];
  double value;
  int end = 0;
  if (sscanf(option, "%31[^=]=%lf%n", key, &value, &end) != 2 || option[end] || !(value >= 0)) return false;
  size_t length = strlen(key);
  bool only_ab = length > 3 && !strcmp(key + length - 3, "_ab");
  bool only_ba = length > 3 && !strcmp(key + length - 3, "_ba");
  if (only_ab || only_ba) key[length - 3] = 0;
  bool is_seed = !strcmp(key, "seed");
  size_t field = 0, fields = sizeof FIELDS / sizeof *FIELDS;
  while (field < fields && strcmp(FIELDS[field].name, key)) field++;
  if (!is_seed && (field == fields || value > FIELDS[field].max)) return false;
  for (int i = only_ba; i < (only_ab ? 1 : 2); i++) {
    Direction *d = &directions[i];
    pthread_mutex_lock(&d->lock);
    if (is_seed) {
      d->random = ((uint64_t)value * 2 + i) * 0x2545F4914F6CDD1DULL;
      d->in_burst = false;
      d->burst_changes = 0;
    } else {
      *(double *)((char *)&d->model + FIELDS[field].offset) = value;
    }
    pthread_mutex_unlock(&d->lock);
  }
  return true;
}

// Lateness in ms that this share of the packets did not exceed.
static double late_ms(const Counters *c, double share) {
  uint64_t total = 0, seen = 0;
  for (int i = 0; i < LATE_BUCKETS; i++) total += c->late[i];
  for (int i = 0; i < LATE_BUCKETS; i++)
    if ((seen += c->late[i]) >= share * total) return total ? (i + 1) * (LATE_BUCKET_NS / 1e6) : 0;
  return 0;
}

static void print_statistics(void) {
  static Counters c;
  for (int i = 0; i < 2; i++) {
    Direction *d = &directions[i];
    pthread_mutex_lock(&d->lock);
    c = d->counters;
    memset(&d->counters, 0, sizeof d->counters);
    pthread_mutex_unlock(&d->lock);
    printf("%s{\"received\":%lu,\"received_bytes\":%lu,\"sent\":%lu,\"sent_bytes\":%lu,\"lost\":%lu,\"dropped\":%lu,"
           "\"failed\":%lu,\"bursts\":%lu,\"late_p50_ms\":%.2f,\"late_p99_ms\":%.2f,\"late_max_ms\":%.2f}%s",
           i ? ",\"ba\":" : "{\"ab\":", c.received, c.received_bytes, c.sent, c.sent_bytes, c.lost, c.dropped, c.failed,
           c.bursts, late_ms(&c, 0.5), late_ms(&c, 0.99), late_ms(&c, 1), i ? "}\n" : "");
  }
}

static void obey(char *line) {
  const char *separators = " \n";
  char *word = strtok(line, separators);
  if (word && !strcmp(word, "stats")) {
    print_statistics();
    return;
  }
  for (; word; word = strtok(NULL, separators)) {
    if (!change(word)) {
      printf("{\"error\":\"cannot use this option: %s\"}\n", word);
      return;
    }
  }
  printf("{\"ok\":true}\n");
}

static void configure(int socket, unsigned long request, struct ifreq *what) {
  if (ioctl(socket, request, what)) die("cannot configure the device");
}

static void set_address(int socket, unsigned long request, struct ifreq *what, const char *address) {
  struct sockaddr_in in = {.sin_family = AF_INET};
  if (inet_pton(AF_INET, address, &in.sin_addr) != 1) die(address);
  memcpy(&what->ifr_addr, &in, sizeof in);
  configure(socket, request, what);
}

// Makes the TUN device in the namespace, point to point from `address` to `peer`.
static int make_device(const char *name, const char *device, const char *address, const char *peer) {
  char path[256];
  snprintf(path, sizeof path, "/run/netns/%s", name);
  int home = open("/proc/self/ns/net", O_RDONLY), namespace = open(path, O_RDONLY);
  if (home < 0 || namespace < 0 || setns(namespace, CLONE_NEWNET)) die(path);
  int tun = open("/dev/net/tun", O_RDWR), control = socket(AF_INET, SOCK_DGRAM, 0);
  if (tun < 0 || control < 0) die("/dev/net/tun");
  struct ifreq what = {.ifr_flags = IFF_TUN | IFF_NO_PI};
  snprintf(what.ifr_name, IFNAMSIZ, "%s", device);
  configure(tun, TUNSETIFF, &what);
  what.ifr_qlen = DEVICE_QUEUE;
  configure(control, SIOCSIFTXQLEN, &what);
  what.ifr_mtu = mtu;
  configure(control, SIOCSIFMTU, &what);
  set_address(control, SIOCSIFADDR, &what, address);
  set_address(control, SIOCSIFNETMASK, &what, "255.255.255.255");
  set_address(control, SIOCSIFDSTADDR, &what, peer);
  configure(control, SIOCGIFFLAGS, &what);
  what.ifr_flags |= IFF_UP | IFF_RUNNING;
  configure(control, SIOCSIFFLAGS, &what);
  close(control);
  if (setns(home, CLONE_NEWNET)) die("cannot return to the first namespace");
  close(home);
  close(namespace);
  return tun;
}

int main(int count, char **arguments) {
  const char *ns_a = NULL, *ns_b = NULL, *ip_a = "10.99.0.1", *ip_b = "10.99.0.2", *dev_a = "emu0", *dev_b = "emu0";
  const char *mtu_text = "1500";
  struct { const char *key, **value; } names[] = {
      {"ns_a=", &ns_a}, {"ns_b=", &ns_b}, {"ip_a=", &ip_a}, {"ip_b=", &ip_b},
      {"dev_a=", &dev_a}, {"dev_b=", &dev_b}, {"mtu=", &mtu_text}};
  pthread_condattr_t monotonic;
  pthread_condattr_init(&monotonic);
  pthread_condattr_setclock(&monotonic, CLOCK_MONOTONIC);
  for (int i = 0; i < 2; i++) {
    pthread_mutex_init(&directions[i].lock, NULL);
    pthread_cond_init(&directions[i].earlier, &monotonic);
    directions[i].model.buffer = 100;
  }
  change("seed=1");
  for (int i = 1; i < count; i++) {
    bool used = false;
    for (size_t k = 0; k < sizeof names / sizeof *names; k++) {
      size_t length = strlen(names[k].key);
      if (strncmp(arguments[i], names[k].key, length)) continue;
      *names[k].value = arguments[i] + length;
      used = true;
    }
    if (!used && !change(arguments[i])) {
      fprintf(stderr, "cannot use this option: %s\n", arguments[i]);
      return 2;
    }
  }
  mtu = atoi(mtu_text);
  if (!ns_a || !ns_b || mtu < 576 || mtu > MAX_MTU) {
    fprintf(stderr, "ns_a and ns_b are needed, and an mtu from 576 to %d\n", MAX_MTU);
    return 2;
  }
  int a = make_device(ns_a, dev_a, ip_a, ip_b), b = make_device(ns_b, dev_b, ip_b, ip_a);
  start_direction(&directions[0], a, b);
  start_direction(&directions[1], b, a);
  setvbuf(stdout, NULL, _IOLBF, 0);
  printf("ready\n");
  for (char line[1024]; fgets(line, sizeof line, stdin);) obey(line);
  return 0;
}
