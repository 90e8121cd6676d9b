// The check that Python objects are unchanged: one pass over dictionaries, classes and tensors, instead of thousands of
// steps of the interpreter.
//
// It needs no header and no symbol of Python. The caller passes the addresses of functions of CPython's stable ABI, and
// memory, so one build serves all versions. The caller holds the GIL, and a reference to every named object. 1 means
// that everything is unchanged. 0 means that something changed, or that there was an error; then the caller checks by
// itself.
#include "vector.h"

namespace {

struct Object;

// Functions of CPython, and of PyTorch: `read` is the slot behind getset_descriptor.__get__, `data_ptr` the function
// behind the method of a tensor. They are in the order of objects.py.
struct Python {
    int (*dict_next)(Object* dict, intptr_t* position, Object** key, Object** value);
    intptr_t (*dict_size)(Object* dict);
    Object* (*dict_get)(Object* dict, Object* key);    // a borrowed reference
    Object* (*attributes_of)(Object*, void* nothing);  // a new one, of its __dict__
    Object* (*type_of)(Object*);                       // a new one
    void (*release)(Object*);
    void (*clear_error)();
    Object* (*error)();
    int64_t (*to_integer)(Object*);
    void* (*to_address)(Object*);
    Object* (*read)(Object* descriptor, Object* instance, Object* type);
    Object* version;  // the descriptor
    Object* (*data_ptr)(Object* tensor, Object* nothing);
    void* (*address_of)(Object* tensor);           // data_ptr, faster, or null. It throws if there is no address.
    int64_t (*version_of)(Object* const* inside);  // _version, faster, or null. It throws if there is no count.
    int64_t inside;  // offset in bytes of the address of PyTorch's tensor in a tensor's object; with version_of
};

// The compared data, one part after the other, each with its number of elements before it.
struct Words {
    const int64_t* at;

    int64_t number() { return *at++; }
    Object* object() { return (Object*)*at++; }
};

// A dictionary holds these keys and values, in this order, and no others.
bool same_dict(const Python& python, Words& words) {
    Object *dict = words.object(), *key, *value;
    int64_t n = words.number();
    if (python.dict_size(dict) != n) return false;
    intptr_t position = 0;
    for (int64_t i = 0; i < n; i++) {
        if (!python.dict_next(dict, &position, &key, &value)) return false;
        if (key != words.object() || value != words.object()) return false;
    }
    return true;
}

bool same_address(const Python& python, Object* tensor, void* address) {
    if (python.address_of != nullptr) return python.address_of(tensor) == address;
    Object* number = python.data_ptr(tensor, nullptr);
    if (number == nullptr) return false;
    bool same = python.to_address(number) == address;
    python.release(number);
    return same;
}

Object* const* inside_of(const Python& python, Object* tensor) {
    return (Object* const*)((const char*)tensor + python.inside);
}

bool same_version(const Python& python, Object* tensor, int64_t version) {
    if (python.version_of != nullptr) return python.version_of(inside_of(python, tensor)) == version;
    Object* number = python.read(python.version, tensor, nullptr);
    if (number == nullptr) return false;
    bool same = python.to_integer(number) == version;
    python.release(number);
    return same;
}

// The tensor is still the one behind its Python object. torch.utils.swap_tensors gives the object another tensor, and
// also another __dict__.
bool same_inside(const Python& python, Object* tensor, Object* attributes, Object* inside) {
    if (python.version_of != nullptr) return *inside_of(python, tensor) == inside;
    Object* now = python.attributes_of(tensor, nullptr);
    if (now == nullptr) return false;
    python.release(now);  // the caller holds one, if it is the same
    return now == attributes;
}

bool all_same(const Python& python, Words words) {
    for (int64_t n = words.number(); n > 0; n--)  // dictionaries
        if (!same_dict(python, words)) return false;
    for (int64_t n = words.number(); n > 0; n--)  // empty ones
        if (python.dict_size(words.object()) != 0) return false;
    for (int64_t n = words.number(); n > 0; n--) {  // (dictionary, key, value or null if the key is not there)
        Object *dict = words.object(), *key = words.object();
        if (python.dict_get(dict, key) != words.object()) return false;
    }
    for (int64_t n = words.number(); n > 0; n--) {  // (object, its class)
        Object* type = python.type_of(words.object());
        python.release(type);  // the caller holds one, if it is the same
        if (type != words.object()) return false;
    }
    for (int64_t n = words.number(); n > 0; n--) {  // (tensor, its __dict__, PyTorch's, address, count of writes)
        Object *tensor = words.object(), *attributes = words.object(), *inside = words.object();
        void* address = words.object();
        if (!same_inside(python, tensor, attributes, inside) || !same_address(python, tensor, address)) return false;
        if (!same_version(python, tensor, words.number())) return false;
    }
    return true;
}

}  // namespace

// python: as above. words: as `all_same` reads them.
EXPORT int fastbert_objects_same(const Python* python, const int64_t* words) {
    bool same = all_same(*python, {words});
    if (python->error() != nullptr) {
        python->clear_error();
        return 0;
    }
    return same;
}
