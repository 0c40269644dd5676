/*
 * The test guest of Drover's lab: 32 bits, no paging, no firmware calls, one virtual CPU.
 *
 * It halts between the ticks of its timer. At each tick it changes some pages, checks some pages and prints one line on
 * the serial port COM1. All numbers are decimal:
 *
 *   BOOT <mem MiB> <pages> <ticks/s>      once; a second one in a log means that the guest was started again
 *   S <seq> <us> <checked> <bad>          seq rises by one; us: virtual clock since BOOT in microseconds;
 *                                         checked: pages checked since BOOT; bad: pages found wrong since BOOT
 *   W <second of day> <us>                at each full second of the real-time clock (wall time of the host)
 *   BAD <page> <gen expected> <gen found> a page without the content that was last written to it
 *
 * Command line (defaults in brackets): ticks=<per second> [100], mem=<MiB to use> [all above 4 MiB],
 * dirty=<pages per second> [0], wss=<MiB that are dirtied in turn> [mem], sweep=<ms to check all memory> [2000],
 * log=<ticks per line> [1].
 *
 * Two clocks show the blackout from inside: `us` (HPET) stands still while QEMU has stopped the guest, the RTC goes on
 * with the host's wall time. So between two W lines, (wall seconds passed) - (us passed) is the time for which the guest
 * was stopped, while a gap in `us` between two S lines is time for which it ran without progress (waiting for a page
 * that post-copy had not yet brought).
 *
 * Memory: each page holds WORDS words of a fixed pattern of its number; of these, the LIVE words depend on the
 * page's generation (the number of times it was changed) too. A page that migration lost shows an old generation. The expected
 * generations are kept in `gens`, ordinary memory that migrates like the rest.
 *
 * TLB: QEMU before 9.0 under TCG loses dirty pages whose stores stay hot in its software TLB ("Fix migration dirty
 * bitmap coherency with TCG memory access"), so the guest flushes it (toggling CR4.PGE) at each tick and after each page.
 */
#include <stdint.h>

typedef uint8_t u8;
typedef uint16_t u16;
typedef uint32_t u32;
typedef uint64_t u64;

enum {
    COM1 = 0x3F8, PIC1 = 0x20, PIC2 = 0xA0, PIT = 0x40, RTC = 0x70,
    VECTOR_TIMER = 0x20, VECTOR_RTC = 0x28,
    PIT_HZ = 1193182,
    MIB = 1 << 20, PAGE = 4096, WORDS = PAGE / 4,
    TEST_BASE = 4 * MIB,
    MAX_PAGES = 480 * 1024,     /* 1.9 GiB: what `gens` has room for below TEST_BASE */
    LIVE = 8, STRIDE = WORDS / LIVE,
    SAMPLES = 4,                /* fixed words looked at per page and sweep, other ones each time */
    US_PER_S = 1000000,
};

#define HPET ((volatile u32 *)0xFED00000)
enum { HPET_PERIOD_FS = 1, HPET_CONFIG = 4, HPET_LOW = 60, HPET_HIGH = 61 };   /* indices of 32-bit registers */

static volatile u32 ticks_seen;
static volatile u32 second_seen;
static u64 second_us;
static u32 gens[MAX_PAGES];
static u32 pages, bad, checked;
static u32 hpet_per_us;
static u64 hpet_start;

static inline void out8(u16 port, u8 value) { __asm__ volatile("outb %0, %1" : : "a"(value), "Nd"(port)); }
static inline u8 in8(u16 port) { u8 v; __asm__ volatile("inb %1, %0" : "=a"(v) : "Nd"(port)); return v; }

static inline void flush_tlb(void)
{
    u32 cr4;
    __asm__ volatile("mov %%cr4, %0; xor $0x80, %0; mov %0, %%cr4" : "=r"(cr4) : : "memory");
}

/* 64 by 32 bits, without libgcc. */
static u64 divide(u64 n, u32 d)
{
    u32 high = n >> 32, low = n, quotient_high = high / d, rest = high % d;
    __asm__("divl %2" : "+a"(low), "+d"(rest) : "r"(d));
    return (u64)quotient_high << 32 | low;
}

/* --- serial line ------------------------------------------------------------------------------------------------- */

static void put_char(char c)
{
    while (!(in8(COM1 + 5) & 0x20))
        ;
    out8(COM1, c);
}

static void put_string(const char *s) { while (*s) put_char(*s++); }

static void put_number(u64 n)
{
    char digits[21], *p = digits + 20;
    for (*p = 0; ; ) {
        u64 q = divide(n, 10);
        *--p = '0' + (char)(n - q * 10);
        if (!(n = q))
            break;
    }
    put_char(' ');
    put_string(p);
}

static void serial_init(void)
{
    out8(COM1 + 1, 0);
    out8(COM1 + 3, 0x80); out8(COM1, 1); out8(COM1 + 1, 0);     /* 115200 baud */
    out8(COM1 + 3, 0x03); out8(COM1 + 2, 0x07);                 /* 8N1, FIFO */
}

/* --- clocks ------------------------------------------------------------------------------------------------------ */

static u64 hpet_now(void)
{
    u32 high, low;
    do {
        high = HPET[HPET_HIGH];
        low = HPET[HPET_LOW];
    } while (high != HPET[HPET_HIGH]);
    return (u64)high << 32 | low;
}

static u64 now_us(void) { return divide(hpet_now() - hpet_start, hpet_per_us); }

static u8 rtc_read(u8 reg) { out8(RTC, reg); return in8(RTC + 1); }
static u32 from_bcd(u8 v) { return (v >> 4) * 10 + (v & 15); }

static u32 rtc_second_of_day(void)
{
    return from_bcd(rtc_read(4)) * 3600 + from_bcd(rtc_read(2)) * 60 + from_bcd(rtc_read(0));
}

static void clocks_init(u32 ticks)
{
    u32 divisor = PIT_HZ / ticks;
    HPET[HPET_CONFIG] |= 1;
    hpet_per_us = 1000000000u / HPET[HPET_PERIOD_FS];
    hpet_start = hpet_now();
    out8(PIT + 3, 0x34);
    out8(PIT, divisor & 255); out8(PIT, divisor >> 8);
    out8(RTC, 0x0B); out8(RTC + 1, 0x12);                       /* 24 hours, BCD, an interrupt at each full second */
    rtc_read(0x0C);
}

/* --- interrupts -------------------------------------------------------------------------------------------------- */

struct frame;
struct gate { u16 low, selector; u8 zero, kind; u16 high; } __attribute__((packed));
static struct gate idt[256];

__attribute__((interrupt)) static void on_timer(struct frame *f)
{
    (void)f;
    ticks_seen++;
    out8(PIC1, 0x20);
}

__attribute__((interrupt)) static void on_second(struct frame *f)
{
    (void)f;
    if (rtc_read(0x0C) & 0x10) {
        second_seen = 1;
        second_us = now_us();
    }
    out8(PIC2, 0x20); out8(PIC1, 0x20);
}

static void set_gate(int vector, void (*handler)(struct frame *))
{
    u32 address = (u32)handler;
    idt[vector] = (struct gate){address & 0xFFFF, 0x08, 0, 0x8E, address >> 16};
}

static void interrupts_init(void)
{
    static struct { u16 limit; u32 base; } __attribute__((packed)) idtr = {sizeof idt - 1, 0};
    idtr.base = (u32)idt;
    set_gate(VECTOR_TIMER, on_timer);
    set_gate(VECTOR_RTC, on_second);
    out8(PIC1, 0x11); out8(PIC2, 0x11);
    out8(PIC1 + 1, VECTOR_TIMER); out8(PIC2 + 1, VECTOR_RTC);
    out8(PIC1 + 1, 4); out8(PIC2 + 1, 2);
    out8(PIC1 + 1, 1); out8(PIC2 + 1, 1);
    out8(PIC1 + 1, 0xFA); out8(PIC2 + 1, 0xFE);                 /* timer, cascade; RTC */
    __asm__ volatile("lidt %0" : : "m"(idtr));
}

/* --- memory ------------------------------------------------------------------------------------------------------ */

static u32 *page_words(u32 page) { return (u32 *)(TEST_BASE + page * PAGE); }
static u32 fixed_word(u32 page, u32 i) { return (page * 0x9E3779B1u) ^ (i * 0x85EBCA6Bu + 0x27D4EB2Fu); }
static u32 live_word(u32 page, u32 gen, u32 k) { return k ? fixed_word(page, k * STRIDE) + gen * 0xC2B2AE35u : gen; }

static void write_live(u32 page, u32 gen)
{
    volatile u32 *w = page_words(page);
    gens[page] = gen;
    for (u32 k = 0; k < LIVE; k++)
        w[k * STRIDE] = live_word(page, gen, k);
}

static void fill_page(u32 page, u32 gen)
{
    u32 *w = page_words(page);
    for (u32 i = 0; i < WORDS; i++)
        w[i] = fixed_word(page, i);
    write_live(page, gen);
}

/* A flush costs some microseconds, so here only one for many pages: a guest is not to be migrated before its first S line. */
static void fill_memory(void)
{
    for (u32 page = 0; page < pages; page++) {
        fill_page(page, 1);
        if (page % 64 == 0)
            flush_tlb();
    }
    flush_tlb();
}

static int page_is_good(u32 page, u32 sweep)
{
    volatile u32 *w = page_words(page);
    for (u32 k = 0; k < LIVE; k++)
        if (w[k * STRIDE] != live_word(page, gens[page], k))
            return 0;
    for (u32 s = 0; s < SAMPLES; s++) {
        u32 i = (sweep * SAMPLES + s) % WORDS;
        if (i % STRIDE && w[i] != fixed_word(page, i))
            return 0;
    }
    return 1;
}

static void check_page(u32 page, u32 sweep)
{
    checked++;
    if (page_is_good(page, sweep))
        return;
    bad++;
    put_string("BAD");
    put_number(page); put_number(gens[page]); put_number(page_words(page)[0]);
    put_char('\n');
    fill_page(page, gens[page] + 1);                            /* so that each loss is reported once */
    flush_tlb();
}

/* --- main -------------------------------------------------------------------------------------------------------- */

static u32 option(const char *cmdline, const char *key, u32 fallback)
{
    for (const char *p = cmdline; *p; p++) {
        u32 i = 0;
        while (key[i] && p[i] == key[i])
            i++;
        if (key[i] || (p != cmdline && p[-1] != ' '))
            continue;
        u32 n = 0;
        for (p += i; *p >= '0' && *p <= '9'; p++)
            n = n * 10 + (u32)(*p - '0');
        return n;
    }
    return fallback;
}

static u32 least(u32 a, u32 b) { return a < b ? a : b; }
static u32 most(u32 a, u32 b) { return a > b ? a : b; }

/* Waits for the next tick; interrupts are open only here, so the rest needs no care for them. */
static void wait_for_tick(u32 *last)
{
    while (ticks_seen == *last)
        __asm__ volatile("sti; hlt; cli" : : : "memory");
    *last = ticks_seen;
}

void guest_main(const u32 *multiboot)
{
    const char *cmdline = (const char *)multiboot[4];
    u32 memory_mib = (multiboot[2] >> 10) + 1;                  /* KiB above 1 MiB */
    u32 ticks = most(19, option(cmdline, "ticks=", 100));       /* the PIT cannot go slower */
    u32 mem = least(option(cmdline, "mem=", memory_mib), memory_mib - TEST_BASE / MIB);
    u32 dirty = option(cmdline, "dirty=", 0), log = most(1, option(cmdline, "log=", 1));
    u32 sweep_ms = most(1, option(cmdline, "sweep=", 2000));

    pages = least(mem * (MIB / PAGE), MAX_PAGES);
    u32 wss_pages = most(1, least(option(cmdline, "wss=", mem) * (MIB / PAGE), pages));
    u32 checks = most(1, (u32)divide((u64)pages * 1000 + (u64)ticks * sweep_ms - 1, ticks * sweep_ms));

    serial_init();
    interrupts_init();
    clocks_init(ticks);
    put_string("BOOT");
    put_number(mem); put_number(pages); put_number(ticks);
    put_char('\n');
    fill_memory();

    u32 last_tick = ticks_seen, dirty_page = 0, check_at = 0, sweep = 0, count = 0, seq = 0;
    u64 last_us = now_us(), owed = 0;                           /* owed: pages to change, times US_PER_S */
    for (;;) {
        wait_for_tick(&last_tick);
        flush_tlb();
        u64 us = now_us();
        /* At most two ticks' worth at a time, so that a slow machine still prints its lines. */
        owed += (u64)dirty * (u32)(us - last_us);
        if (owed > (u64)dirty * (2 * US_PER_S / ticks) + US_PER_S)
            owed = (u64)dirty * (2 * US_PER_S / ticks) + US_PER_S;
        last_us = us;
        for (; owed >= US_PER_S; owed -= US_PER_S) {
            write_live(dirty_page, gens[dirty_page] + 1);
            flush_tlb();
            dirty_page = dirty_page + 1 == wss_pages ? 0 : dirty_page + 1;
        }
        for (u32 n = 0; n < checks && pages; n++) {
            check_page(check_at, sweep);
            if (++check_at == pages) {
                check_at = 0;
                sweep++;
            }
        }
        if (second_seen) {
            second_seen = 0;
            put_string("W");
            put_number(rtc_second_of_day()); put_number(second_us);
            put_char('\n');
        }
        if (++count % log == 0) {
            put_string("S");
            put_number(++seq); put_number(us); put_number(checked); put_number(bad);
            put_char('\n');
        }
    }
}
