/* Stands in for pyxis on the test's cluster: takes its options, and runs the tasks of --container-image=DIR with DIR
 * as their root, --container-mounts=FROM:TO[:FLAGS],... bound in. It pulls no images and makes no user namespace. */
#define _GNU_SOURCE
#include <errno.h>
#include <fcntl.h>
#include <sched.h>
#include <slurm/spank.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mount.h>
#include <sys/stat.h>
#include <unistd.h>

SPANK_PLUGIN(containers, 1)

enum { IMAGE, MOUNTS, NO_HOME, COUNT };
static char *given[COUNT];

static int note(int which, const char *argument, int remote)
{
    (void)remote;
    given[which] = strdup(argument ? argument : "");
    return 0;
}

static struct spank_option options[COUNT] = {
    {"container-image", "DIR", "root of the tasks", 1, IMAGE, note},
    {"container-mounts", "FROM:TO,...", "what is bound into it", 1, MOUNTS, note},
    {"no-container-mount-home", NULL, "the home directory stays outside", 0, NO_HOME, note},
};

int slurm_spank_init(spank_t spank, int count, char **arguments)
{
    (void)count, (void)arguments;
    for (int i = 0; i < COUNT; i++)
        if (spank_option_register(spank, &options[i]) != ESPANK_SUCCESS)
            return -1;
    return 0;
}

static void make_folders(char *path)
{
    for (char *slash = strchr(path + 1, '/'); slash; slash = strchr(slash + 1, '/')) {
        *slash = 0;
        mkdir(path, 0755);
        *slash = '/';
    }
}

static int bind_in(const char *from, const char *to)
{
    char target[4096];
    struct stat found;
    if (stat(from, &found)) {
        slurm_error("containers: %s: %s", from, strerror(errno));
        return -1;
    }
    snprintf(target, sizeof target, "%s%s", given[IMAGE], to);
    make_folders(target);
    if (S_ISDIR(found.st_mode))
        mkdir(target, 0755);
    else
        close(open(target, O_CREAT | O_WRONLY, 0644));
    if (mount(from, target, NULL, MS_BIND | MS_REC, NULL)) {
        slurm_error("containers: cannot mount %s at %s: %s", from, target, strerror(errno));
        return -1;
    }
    return 0;
}

int slurm_spank_task_init_privileged(spank_t spank, int count, char **arguments)
{
    (void)spank, (void)count, (void)arguments;
    static const char *always[] = {"/proc", "/sys", "/dev", "/etc/hosts"};
    if (!given[IMAGE])
        return 0;
    if (unshare(CLONE_NEWNS) || mount(NULL, "/", NULL, MS_REC | MS_PRIVATE, NULL))
        return -1;
    for (size_t i = 0; i < sizeof always / sizeof *always; i++)
        if (bind_in(always[i], always[i]))
            return -1;
    char *rest, *word = strtok_r(strdup(given[MOUNTS] ? given[MOUNTS] : ""), ",", &rest);
    for (; word; word = strtok_r(NULL, ",", &rest)) {
        char *part, *from = strtok_r(word, ":", &part), *to = strtok_r(NULL, ":", &part);
        if (bind_in(from, to ? to : from))
            return -1;
    }
    if (chroot(given[IMAGE]) || chdir("/")) {
        slurm_error("containers: %s: %s", given[IMAGE], strerror(errno));
        return -1;
    }
    return 0;
}
