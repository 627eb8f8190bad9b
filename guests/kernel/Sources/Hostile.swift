extension SelfTest { func hostile() {} }
