/* NIXL's C face, as far as `pdlink doctor` calls it: one agent with one backend that comes up and does nothing. Linked
   against a library by UCX's name, so that both are loaded as a wheel's would be. */
#include <stddef.h>
#include <string.h>

static int thing;
static const char *backend = "UCX";

#define GIVES(name, ...) int name(__VA_ARGS__) { *out = &thing; return 0; }
#define DOES(name) int name(void) { return 0; }

GIVES(nixl_capi_create_configured_agent, const char *name, const void *config, void **out)
GIVES(nixl_capi_get_available_plugins, void *agent, void **out)
GIVES(nixl_capi_create_params, void **out)
GIVES(nixl_capi_create_backend, void *agent, const char *name, void *params, void **out)
GIVES(nixl_capi_create_reg_dlist, int kind, void **out)
GIVES(nixl_capi_create_xfer_dlist, int kind, void **out)
int nixl_capi_string_list_size(void *list, size_t *out) { *out = 1; return 0; }
int nixl_capi_string_list_get(void *list, size_t index, const char **out) { *out = backend; return 0; }
DOES(nixl_capi_destroy_agent)
DOES(nixl_capi_destroy_string_list)
DOES(nixl_capi_params_add)
DOES(nixl_capi_destroy_params)
DOES(nixl_capi_destroy_backend)
DOES(nixl_capi_reg_dlist_add_desc)
DOES(nixl_capi_destroy_reg_dlist)
DOES(nixl_capi_register_mem)
DOES(nixl_capi_deregister_mem)
DOES(nixl_capi_xfer_dlist_add_desc)
DOES(nixl_capi_destroy_xfer_dlist)
DOES(nixl_capi_invalidate_remote_md)
int nixl_capi_get_local_md(void) { return -2; }
int nixl_capi_load_remote_md(void) { return -2; }
int nixl_capi_create_xfer_req(void) { return -2; }
int nixl_capi_post_xfer_req(void) { return -2; }
int nixl_capi_get_xfer_status(void) { return -2; }
int nixl_capi_release_xfer_req(void) { return -2; }
int nixl_capi_destroy_xfer_req(void) { return -2; }
