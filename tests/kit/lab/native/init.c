/*
 * Process 1 of a test host, as far as a host without its own PID namespace can have one:  init SERVICE_PID_FILE [COMMAND…]
 *
 * - It is a child subreaper, so every orphan of the host (QEMU above all) becomes its child and is reaped at once. (In
 *   a container the real process 1 may take seconds, and libvirt then believes that a dead QEMU still lives.)
 * - It starts COMMAND, the host's only service, writes its process id to SERVICE_PID_FILE, and empties the file when it ends.
 * - SIGUSR1 starts COMMAND again if it does not run. Nothing else starts it again: tests kill it on purpose.
 */
#define _GNU_SOURCE
#include <errno.h>
#include <fcntl.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <sys/prctl.h>
#include <sys/wait.h>
#include <unistd.h>

static const char *pid_file;
static pid_t service;

static void write_pid(void)
{
    char text[16];
    int length = service ? snprintf(text, sizeof text, "%d\n", service) : 0;
    int fd = open(pid_file, O_WRONLY | O_CREAT | O_TRUNC | O_CLOEXEC, 0644);
    if (fd < 0 || write(fd, text, (size_t)length) != length)
        perror(pid_file);
    close(fd);
}

static void start_service(char **command, const sigset_t *blocked)
{
    if (!*command || service)
        return;
    service = fork();
    if (service < 0) {
        perror("fork");
        service = 0;
    } else if (service == 0) {
        sigprocmask(SIG_UNBLOCK, blocked, NULL);
        setsid();
        execvp(*command, command);
        perror(*command);
        _exit(127);
    }
    write_pid();
}

static void reap(void)
{
    pid_t pid;
    while ((pid = waitpid(-1, NULL, WNOHANG)) > 0)
        if (pid == service) {
            service = 0;
            write_pid();
        }
}

int main(int argc, char **argv)
{
    sigset_t signals;
    if (argc < 2)
        return 2;
    pid_file = argv[1];
    if (prctl(PR_SET_CHILD_SUBREAPER, 1))
        return perror("prctl"), 1;
    sigemptyset(&signals);
    sigaddset(&signals, SIGCHLD);
    sigaddset(&signals, SIGUSR1);
    sigprocmask(SIG_BLOCK, &signals, NULL);
    start_service(argv + 2, &signals);
    for (;;) {
        int signal = sigwaitinfo(&signals, NULL);
        if (signal < 0 && errno != EINTR)
            return perror("sigwaitinfo"), 1;
        reap();
        if (signal == SIGUSR1)
            start_service(argv + 2, &signals);
    }
}
